"""The recipes of configs/tokenizers fit together, and what a training may change midway is little."""

import dataclasses
from pathlib import Path

import pytest
from tests_support import tiny_config

from cluster.job_plan import check_config
from cluster.tokenizer_options import FREE, TokenizerJobOptions, check_training, fixed_options, num_steps, settle
from stages.config import load_config, select_sections
from stages.errors import ConfigError
from stages.first_stage.tokenizer import Tokenizer
from stages.first_stage.tokenizer_config import tokenizer_config
from stages.options import Config

RECIPES = Path(__file__).parents[2] / "configs" / "tokenizers"
BASES = {
    "depth": "segmentation",
    "faces-f16": "imagenet-f16",
    "folder-f16": "imagenet-f16",
    "imagenet-f8": "imagenet-f16",
    "photographs-128": "photographs",
}


@pytest.mark.parametrize("name", sorted(path.stem for path in RECIPES.glob("*.yaml")))
def test_a_recipe_fits_together(name):
    names = [BASES[name], name] if name in BASES else [name]
    config = load_config([str(RECIPES / f"{each}.yaml") for each in names])
    check_config(config)
    options = select_sections(TokenizerJobOptions, config)
    check_training(options)
    train = options.tokenizer_train
    architecture = tokenizer_config(options.tokenizer, options.images)
    assert name.rpartition("-f")[2] in (name, str(architecture.downsample))  # imagenet-f16 has a stride of 16
    if train.discriminator_weight:
        assert train.discriminator_warm_samples > 0  # it has learned something when its term is switched on
        assert train.discriminator_start_samples + train.discriminator_ramp_samples < train.num_samples
    else:
        Tokenizer(architecture)  # the small ones are built, too


def test_steps_are_rounded_up():
    train = tiny_config("x", tokenizer_train={"num_samples": 33, "global_batch_size": 16}).tokenizer_train
    assert num_steps(train) == 3


def test_every_free_option_exists():
    for section, names in FREE.items():
        fields = {field.name for field in dataclasses.fields(getattr(Config(), section))}
        assert names <= fields


def test_a_new_training_settles_what_its_options_leave_open():
    options = settle(options_with({"base_channels": 16, "num_norm_groups": None}), None)
    assert (options.tokenizer.num_norm_groups, options.tokenizer_train.revive_share) == (4, 0.95)


@pytest.mark.parametrize(
    "saved, expected",
    [({}, (32, 0.8)), ({"tokenizer": {"num_norm_groups": 8}}, (8, 0.8)), ({"tokenizer_train": {"revive_share": 0.5}}, (32, 0.5))],
)
def test_a_training_goes_on_with_the_defaults_that_it_began_with(saved, expected):
    begun = {"tokenizer": {}, "tokenizer_train": {}} | saved
    options = settle(options_with({"num_norm_groups": None}), begun)
    assert (options.tokenizer.num_norm_groups, options.tokenizer_train.revive_share) == expected
    asked = options_with({"num_norm_groups": 2}, revive_share=0.0)
    assert settle(asked, begun) == asked


def options_with(tokenizer=None, images=None, **train) -> TokenizerJobOptions:
    sections = {"tokenizer_train": train, "tokenizer": tokenizer or {}, "images": images or {}}
    return select_sections(TokenizerJobOptions, tiny_config("x", **sections))


def test_a_longer_training_is_another_one_unless_nothing_in_it_follows_its_length():
    def are_equal(**options) -> bool:
        shorter, longer = (fixed_options(options_with(num_samples=n, **options)) for n in (64, 128))
        return shorter == longer

    assert are_equal(decay="none", revive_every_steps=0)
    assert not are_equal(revive_every_steps=0)
    assert not are_equal(decay="none", revive_every_steps=10), "the end of a training revives none"
    assert not are_equal(decay="none", revive_every_steps=0, tokenizer={"quantizer": "gumbel"})


@pytest.mark.parametrize(
    "options, message",
    [
        ({"discriminator_weight": 0.1, "discriminator_channels": 10}, "discriminator_channels is 10, but .* multiple of 4.*Use 8"),
        ({"tokenizer": {"channel_multipliers": ()}}, r"tokenizer.channel_multipliers is \[\], but"),
        ({"perceptual_weight": 1.0}, "perceptual_vgg names no weights"),
        ({"perceptual_weight": 1.0, "perceptual_vgg": "x", "images": {"size": 8}}, "images.size is 8. Use at least 16"),
    ],
)
def test_what_cannot_be_built_is_refused_before_anything_starts(options, message):
    with pytest.raises(ConfigError, match=message):
        check_training(options_with(**options))


def test_what_holds_back_no_discriminator_is_warned_of(caplog):
    check_training(options_with(discriminator_weight=0.0, lecam_weight=0.1))
    assert "tokenizer_train.lecam_weight is 0.1, but there is no discriminator" in caplog.text and "r1_weight" not in caplog.text


def test_attention_at_a_side_that_does_not_occur_is_warned_of(caplog):
    check_training(options_with(tokenizer={"attention_resolutions": (16, 5)}, images={"size": 16}))
    assert "there is no attention at 5" in caplog.text
