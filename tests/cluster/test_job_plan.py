"""The plan: derived numbers against hand-made ones, and the checks that need more than one section."""

import pytest

from cluster.job_plan import check_config, derive, model_state_bytes, render, row_flop
from stages.config import build
from stages.errors import ConfigError
from stages.options import Config

SMALL = {
    "images": {"size": 32, "views": ["center", "flip"]},
    "tokenizer": {
        "channel_multipliers": [1, 2, 2],
        "base_channels": 32,
        "codebook_size": 1024,
        "attention_resolutions": [],
    },
    "model": {"num_layers": 2, "hidden_size": 64, "num_heads": 2},
    "train": {"global_batch_size": 64, "micro_batch_size": 16, "num_steps": 50},
    "scaling": {"num_workers": 2},
    "codes": {"shard_size": 300},
}


def config(**sections):
    return build(Config, {name: {**SMALL.get(name, {}), **sections.get(name, {})} for name in {**SMALL, **sections}})


def test_derived_numbers():
    derived = derive(config(), num_images=1000, num_classes=10)
    assert derived["code dataset"] == {
        "images": 1000,
        "views": 2,
        "rows": 2000,
        "codes per image": 64,
        "bits per code": 10,
        "bytes per row": 80,
        "bytes of codes": 160_000,
        "shards": 4,
    }
    assert derived["training"]["gradient accumulation steps"] == 2
    assert derived["training"]["steps per epoch"] == 16
    assert "ZeRO-3" in render(config(), derived)


@pytest.mark.parametrize("precision, bytes_per_parameter", [("fp32", [16, 12, 10, 8]), ("bf16", [16, 10, 9, 8])])
def test_zero_shards_what_it_says(precision, bytes_per_parameter):
    assert [model_state_bytes(100, stage, 2, precision) for stage in range(4)] == [100 * b for b in bytes_per_parameter]


def test_flop_of_a_row_is_six_per_parameter_and_position_plus_attention():
    assert row_flop(parameters=1000, num_layers=0, hidden_size=8, num_codes=10) == 60_000
    assert row_flop(parameters=0, num_layers=2, hidden_size=8, num_codes=10) == 12 * 2 * 8 * 100


@pytest.mark.parametrize(
    "sections, words",
    [
        ({"train": {"global_batch_size": 250}}, ["train.global_batch_size is 250", "multiple of", "32", "Use 256"]),
        ({"tokenizer": {"codebook_size": 100_000}}, ["tokenizer.codebook_size is 100000", "17 bits", "65536"]),
        ({"images": {"size": 30}}, ["images.size is 30", "multiple of 4"]),
        ({"tokenizer_train": {"discriminator_weight": 1.0, "discriminator_layers": 5}}, ["discriminator_layers is 5"]),
        ({"optim": {"betas": [0.9]}}, ["optim.betas", "two numbers"]),
        ({"evaluation": {"num_samples": 5, "num_blocks": 10}}, ["evaluation.num_blocks is 10"]),
    ],
)
def test_configurations_that_cannot_work_are_refused(sections, words):
    with pytest.raises(ConfigError) as caught:
        check_config(config(**sections))
    assert all(word in str(caught.value) for word in words), str(caught.value)
