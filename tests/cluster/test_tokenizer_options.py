"""The recipes of configs/tokenizers fit together, and what a training may change midway is little."""

import dataclasses
from pathlib import Path

import pytest
from tests_support import tiny_config

from cluster.job_plan import check_config
from cluster.tokenizer_options import FREE, TokenizerJobOptions, check_training, fixed_options, num_steps
from stages.config import load_config, select_sections
from stages.first_stage.tokenizer import Tokenizer, tokenizer_config
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


def test_a_longer_training_is_another_one_unless_the_rate_is_constant():
    def fixed(**train):
        return fixed_options(select_sections(TokenizerJobOptions, tiny_config("x", tokenizer_train=train)))

    assert fixed(num_samples=64) != fixed(num_samples=128)
    assert fixed(num_samples=64, decay="none") == fixed(num_samples=128, decay="none")
