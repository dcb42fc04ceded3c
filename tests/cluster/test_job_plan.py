"""The plan: derived numbers against hand-made ones, and the checks that need more than one section."""

import dataclasses
import json

import pytest
from tests_support import TINY_TOKENIZER

import ray_job
from cluster.job_plan import check_config, derive, render, stored_tokenizer
from pipeline.code_dataset.parts import RowFormat
from pipeline.tokenizers import store_tokenizer
from stages.config import build
from stages.errors import ConfigError
from stages.first_stage.tokenizer import Tokenizer
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
        "codebook size": 1024,
        "bits per code": 10,
        "bytes per row": 80,
        "bytes of codes": 160_000,
        "shards": 4,
    }
    assert derived["training"]["gradient accumulation steps"] == 2
    assert derived["training"]["steps per epoch"] == 16
    assert "ZeRO-3" in render(config(), derived)


def test_derived_numbers_of_a_tokenizers_training():
    train = {"num_samples": 1010, "global_batch_size": 20, "checkpoint_every_steps": 10}
    adversary = {"discriminator_weight": 0.1, "discriminator_layers": 2, "discriminator_start_samples": 500}
    plain = derive(config(tokenizer_train=train), num_images=102, num_classes=10)
    assert plain["tokenizer training"] == {"steps": 51, "epochs": 10.0, "commits": 6, "groups of channels in norms": 8}
    warm = {**train, **adversary, "discriminator_warm_samples": 90}
    derived = derive(config(tokenizer_train=warm), num_images=102, num_classes=10)["tokenizer training"]
    assert derived["discriminator learns from step"] == 21  # the first whose images before it are 410 or more
    assert derived["discriminator counts from step"] == 25


@pytest.mark.parametrize(
    "tokenizer, size, bits",
    [
        ({"quantizer": "fsq", "codebook_size": None, "fsq_levels": [8, 8, 8, 6, 5]}, 15_360, 14),
        ({"quantizer": "lfq", "codebook_size": None, "codebook_dim": 12}, 4096, 12),
        ({"quantizer": "bsq", "codebook_size": 512}, 512, 9),
        ({"quantizer": "gumbel", "codebook_size": 8192}, 8192, 13),
    ],
)
def test_the_quantizer_decides_the_bits(tokenizer, size, bits):
    derived = derive(config(tokenizer=tokenizer), num_images=1000, num_classes=10)["code dataset"]
    assert (derived["codebook size"], derived["bits per code"]) == (size, bits)
    assert derived["bytes per row"] == 64 * bits // 8


def test_the_state_of_a_rank_is_what_deepspeed_keeps():
    derived = derive(config(), num_images=1000, num_classes=10)
    parameters = derived["transformer"]["parameters"]
    state = list(derived["model state bytes per rank"].values())
    assert state[0] == 16 * parameters
    assert state[1] == (2 + 2 + 12 / 2) * parameters
    assert state[2] == (2 + 2 / 2 + 12 / 2) * parameters
    assert (
        state[3] == (2 / 2 + 2 + 2 / 2 + 12 / 2) * parameters
    )  # weights as small as these stay whole beside their slices


def test_a_range_of_workers_is_planned_at_both_ends():
    derived = derive(config(scaling={"num_workers": [2, 4]}), num_images=1000, num_classes=10, gpu="A100")
    assert derived["training"]["world size"] == [2, 4]
    assert derived["training"]["gradient accumulation steps"] == [2, 1]
    few, many = derived["memory per rank at world size 2"], derived["memory per rank at world size 4"]
    assert few["ZeRO-3"]["peak"] > many["ZeRO-3"]["peak"]
    assert [few["ZeRO-1"]["model state"], many["ZeRO-1"]["model state"]] == derived["model state bytes per rank"][
        "ZeRO-1"
    ]
    speed = derived["on A100 at 40% of its peak"]
    assert speed["hours"][0] == pytest.approx(2 * speed["hours"][1])
    assert speed["GPU-hours"][0] == pytest.approx(speed["GPU-hours"][1])
    assert "2 to 4" in render(config(), derived)


def test_hours_on_a_gpu_follow_from_its_peak():
    derived = derive(config(), num_images=1000, num_classes=10, gpu="H100", mfu=0.5, hours=2.0)
    flop, speed = derived["transformer"]["FLOP per step"], derived["on H100 at 50% of its peak"]
    assert speed["steps per second"] == pytest.approx(2 * 989.4e12 * 0.5 / flop)
    assert speed["GPU-hours"] == pytest.approx(50 * flop / (989.4e12 * 0.5) / 3600)
    assert derived["to finish in 2 hours"]["steps per second"] == pytest.approx(50 / 7200)


def test_what_a_gpu_cannot_hold_is_said():
    large = {"num_layers": 24, "hidden_size": 3200, "num_heads": 32}
    whole = {"train": {"global_batch_size": 512, "micro_batch_size": 1}, "scaling": {"num_workers": 8}}
    stages = derive(config(model=large, **whole), 1000, 10, gpu="L40S")["memory per rank at world size 8"]
    assert [stages[f"ZeRO-{stage}"]["fits"] for stage in range(4)] == [False, True, True, True]
    text = render(config(), derive(config(model=large, **whole), 1000, 10, gpu="L40S"))
    assert "fits checkpointed" in text and " no " in text


@pytest.mark.parametrize(
    "sections, question, words",
    [
        ({}, {"gpu": "V100"}, ["--gpu is V100", "A100, H100"]),
        ({"train": {"precision": "fp32"}}, {"gpu": "H100"}, ["--gpu is H100", "train.precision is fp32"]),
        ({}, {"mfu": 40.0}, ["--mfu is 40", "at most 1"]),
        ({}, {"hours": 0.0}, ["--hours is 0", "above 0"]),
        ({"sampling": {"labels": [10]}}, {}, ["sampling.labels is [10]", "0 to 9"]),
        ({"sampling": {"labels": []}}, {}, ["sampling.labels is []", "0 to 9"]),
        ({"conditioning": {"name": "class", "num_tokens": 4}}, {}, ["conditioning.num_tokens is 4", "has 1 per image"]),
        ({"conditioning": {"name": "no_such.module:Class"}}, {}, ["conditioning.name is no_such.module:Class", "cannot be imported"]),
    ],
)
def test_what_has_no_plan_is_refused(sections, question, words):
    with pytest.raises(ConfigError) as caught:
        derive(config(**sections), 1000, 10, **question)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_the_command_takes_several_files_and_a_gpu(tmp_path, capsys):
    base, model = tmp_path / "base.yaml", tmp_path / "model.yaml"
    base.write_text("source: {name: scenes, num_images: 100}\nmodel: {num_layers: 2, hidden_size: 64, num_heads: 2}\n")
    model.write_text("model: {num_layers: 3}\n")
    files = ["-c", str(base), "-c", str(model)]
    command = ["plan", *files, "conditioning.name=none", "--gpu", "H200", "--mfu", "0.3", "--hours", "1", "--json"]
    assert ray_job.main(command) == 0
    plan = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert (plan["config"]["model"]["num_layers"], plan["config"]["model"]["hidden_size"]) == (3, 64)
    assert {"on H200 at 30% of its peak", "to finish in 1 hours"} <= set(plan["derived"])


@pytest.mark.parametrize("override", ["evaluation.extractor=no_such.module:Class", "evaluation.metrics=[beauty]"])
def test_the_command_refuses_what_cannot_be_measured(override, tmp_path, capsys):
    path = tmp_path / "config.yaml"
    path.write_text("source: {name: scenes, num_images: 100}\n")
    assert ray_job.main(["plan", "-c", str(path), override]) == 2
    assert override.partition("=")[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    "sections, words",
    [
        ({"train": {"global_batch_size": 250}}, ["train.global_batch_size is 250", "multiple of", "32", "Use 256"]),
        ({"tokenizer": {"codebook_size": 100_000}}, ["tokenizer.codebook_size is 100000", "17 bits", "65536"]),
        ({"tokenizer": {"quantizer": "fsq"}}, ["tokenizer.fsq_levels is empty"]),
        (
            {"tokenizer": {"quantizer": "lfq", "codebook_size": 1024, "codebook_dim": 8}},
            ["codebook_size is 1024", "codebook_dim=8", "256"],
        ),
        (
            {"tokenizer": {"quantizer": "bsq", "codebook_size": None, "codebook_dim": 18}},
            ["262144", "18 bits", "65536"],
        ),
        (
            {"tokenizer": {"quantizer": "gumbel"}, "tokenizer_train": {"entropy_weight": 0.5}},
            ["tokenizer_train.entropy_weight is 0.5", "quantizer=gumbel"],
        ),
        ({"images": {"size": 30}}, ["images.size is 30", "multiple of 4"]),
        ({"tokenizer_train": {"discriminator_weight": 1.0, "discriminator_layers": 5}}, ["discriminator_layers is 5"]),
        ({"optim": {"betas": [0.9]}}, ["optim.betas", "two numbers"]),
        ({"scaling": {"num_workers": [4, 2]}}, ["scaling.num_workers is [4, 2]", "[min, max]", "[2, 4]"]),
        ({"scaling": {"num_workers": [1, 2, 3]}}, ["scaling.num_workers is [1, 2, 3]", "[min, max]"]),
        ({"scaling": {"num_workers": [1, 65]}}, ["train.global_batch_size is 64", "65 workers"]),
        (
            {"deepspeed": {"zero_stage": 0, "offload_optimizer": True}},
            ["deepspeed.offload_optimizer is true", "zero_stage of at least 1", "which is 0"],
        ),
        (
            {"deepspeed": {"zero_stage": 2, "offload_parameters": True}},
            ["deepspeed.offload_parameters is true", "zero_stage=3", "which is 2"],
        ),
        (
            {"train": {"compile": True}, "deepspeed": {"zero_stage": 3}},
            ["train.compile is true", "zero_stage=3", "compile=false"],
        ),
        ({"source": {"number_maps": ["view=a"]}}, ["source.number_maps names view=a", "view is a column of every code dataset"]),
        ({"source": {"label_maps": ["label=a"]}}, ["source.label_maps names label=a", "label is a column of every code dataset"]),
        ({"source": {"label_maps": ["depth=a"], "number_maps": ["depth=b"]}}, ["source.number_maps names depth=b", "of its own"]),
        ({"codes": {"conditions": ["depth", "edges", "depth"]}}, ["codes.conditions is", "it names depth more than once"]),
        ({"train": {"keep_best": 2}}, ["train.keep_best is 2", "train.validation_path"]),
    ],
)
def test_configurations_that_cannot_work_are_refused(sections, words):
    with pytest.raises(ConfigError) as caught:
        check_config(config(**sections))
        stored_tokenizer(config(**sections))
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize("name", RowFormat(num_codes=4, codebook_size=8, has_labels=True).shard_schema.names)
def test_a_map_may_not_be_stored_under_the_name_of_another_column(capsys, name):
    assert ray_job.main(["plan", "-c", "configs/demo.yaml", f"codes.conditions=[{name}]"]) == 2
    assert f"codes.conditions is ['{name}'], but {name} is a column of every code dataset" in capsys.readouterr().err


def test_a_tokenizer_that_is_there_counts_and_not_what_would_be_trained(tmp_path):
    """An imported one needs none of the options that describe it."""
    path = str(tmp_path / "tokenizer")
    store_tokenizer(Tokenizer(TINY_TOKENIZER), path)
    labels = {"input": "segmentation", "num_labels": 3, "path": path}
    asked = config(tokenizer=labels, tokenizer_train={"discriminator_weight": 0.5})
    check_config(asked)
    stored = stored_tokenizer(asked)
    assert stored == dataclasses.replace(TINY_TOKENIZER, quantizer="vq")  # as it is stored
    derived = derive(asked, num_images=100, num_classes=10, tokenizer=stored)
    side = 32 // TINY_TOKENIZER.downsample
    assert derived["code dataset"]["codes per image"] == side * side
    assert derived["code dataset"]["codebook size"] == TINY_TOKENIZER.codebook_size
    assert "tokenizer training" not in derived
    with pytest.raises(ConfigError, match="images.size is 33, but the tokenizer's patches"):
        stored_tokenizer(config(tokenizer=labels, images={"size": 33}))


@pytest.mark.parametrize(
    "sections",
    [
        {"scaling": {"num_workers": [1, 3]}, "train": {"global_batch_size": 50}},
        {"deepspeed": {"zero_stage": 1, "offload_optimizer": True}},
        {"deepspeed": {"zero_stage": 3, "offload_parameters": True}},
        {"train": {"keep_best": 1, "validation_path": "runs/holdout"}},
        {"tokenizer_train": {"perceptual_vgg": "https://host/vgg16.pth"}, "codes": {"path": "s3://bucket/codes"}},
    ],
)
def test_configurations_that_can_work_pass(sections):
    check_config(config(**sections))
