"""Configuration: what is accepted, what is refused, and how the refusal reads."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch
import yaml

from stages.config import build, load_config, reference_page, to_yaml
from stages.errors import ConfigError
from stages.options import Config

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("train: {num_steps: 7}\noptim: {learning_rate: 3e-4}\n")
    return str(path)


def test_file_and_overrides_are_merged(file):
    config = load_config(
        file, ["train.global_batch_size=12", "optim.betas=[0.8, 0.9]", "source.path=s3://bucket/images"]
    )
    assert config.train.num_steps == 7
    assert config.train.global_batch_size == 12
    assert config.optim.learning_rate == 3e-4  # YAML 1.1 reads this as text
    assert config.optim.betas == (0.8, 0.9)
    assert config.source.path == "s3://bucket/images"


def test_keys_of_later_files_go_over_those_of_earlier_ones(file, tmp_path):
    later = tmp_path / "later.yaml"
    later.write_text("optim: {learning_rate: 1e-4, grad_clip: 2}\nmodel: {num_layers: 3}\n")
    config = load_config([file, str(later)], ["model.num_layers=4"])
    assert config.train.num_steps == 7
    assert (config.optim.learning_rate, config.optim.grad_clip) == (1e-4, 2.0)
    assert config.model.num_layers == 4
    assert load_config([str(later), file]).optim.learning_rate == 3e-4


@pytest.mark.parametrize("texts", [["train: 5", "train: {num_steps: 7}"], ["train: {num_steps: 7}", "train: 5"]])
def test_a_section_that_is_none_is_refused_in_any_file(tmp_path, texts):
    paths = [tmp_path / f"{i}.yaml" for i in range(len(texts))]
    for path, text in zip(paths, texts):
        path.write_text(text)
    with pytest.raises(ConfigError, match="train is 5, but it must be a section"):
        load_config([str(path) for path in paths], ["train.num_steps=8"] if texts[0] == "train: 5" else [])


@pytest.mark.parametrize(
    "override, words",
    [
        ("train.no_such_key=1", ["train.no_such_key", "num_steps"]),
        ("trian.num_steps=1", ["trian", "train"]),
        ("train.global_batch_size=abc", ["train.global_batch_size", "'abc'", "whole number"]),
        ("train.global_batch_size=true", ["train.global_batch_size", "whole number"]),
        ("train.global_batch_size=1.5", ["train.global_batch_size", "whole number"]),
        ("train.global_batch_size=0", ["train.global_batch_size", "at least 1"]),
        ("train.precision=fp16", ["train.precision", "fp32", "bf16"]),
        ("deepspeed.zero_stage=4", ["deepspeed.zero_stage", "0, 1, 2, 3"]),
        ("sampling.top_p=1.5", ["sampling.top_p", "at most 1"]),
        ("sampling.temperature=0", ["sampling.temperature", "above 0"]),
        ("optim.learning_rate=fast", ["optim.learning_rate", "a number"]),
        (f"optim.learning_rate={10**400}", ["optim.learning_rate", "a number"]),
        ("tokenizer.fsq_levels=[5, 1001]", ["tokenizer.fsq_levels[1] is 1001", "at most 1000"]),
        ("optim.weight_decay=.nan", ["optim.weight_decay is nan", "finite"]),
        ("sampling.cfg_scale=.inf", ["sampling.cfg_scale is inf", "finite"]),
        ("sweep.cfg_scale=[1, .nan]", ["sweep.cfg_scale[1] is nan", "finite"]),
        ("optim.betas=[0.9, 1.5]", ["optim.betas[1] is 1.5", "below 1"]),
        ("optim.betas=[1.0, 0.9]", ["optim.betas[0] is 1.0", "below 1"]),
        ("optim.betas=[-0.1, 0.9]", ["optim.betas[0] is -0.1", "at least 0"]),
        ("images.views=center", ["images.views", "list"]),
        ("train=5", ["section.key=value"]),
        ("num_steps", ["section.key=value"]),
    ],
)
def test_bad_overrides_are_refused_with_key_value_and_rule(file, override, words):
    with pytest.raises(ConfigError) as caught:
        load_config(file, [override])
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "text, words",
    [
        ("[1, 2]", "holds no mapping of sections"),
        ("0", "holds no mapping of sections"),
        ("train: 5", "train is 5, but it must be a section"),
        ("train: 0", "train is 0, but it must be a section"),
        ("train: []", r"train is \[\], but it must be a section"),
        ("train: [", "not valid YAML"),
        ("just text", "holds no mapping of sections"),
        ("train: {num_steps: 5}\nmodel: {}\ntrain: {precision: fp32}", "the key train is there twice.*line 3"),
        ("train: {num_steps: 5, num_steps: 6}", "the key num_steps is there twice"),
    ],
)
def test_bad_files_are_refused(tmp_path, text, words):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=f"(?s){words}"):
        load_config(str(path))


def test_a_file_that_is_no_text_is_refused(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_bytes("# für".encode("latin-1"))
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(str(path))


@pytest.mark.parametrize("text", ["", "train:", "# nothing yet"])
def test_what_is_empty_leaves_the_defaults(tmp_path, text):
    path = tmp_path / "empty.yaml"
    path.write_text(text)
    assert load_config(str(path)) == Config()


def test_a_merged_key_may_be_given_again(tmp_path):
    path = tmp_path / "merged.yaml"
    path.write_text("run: {<<: {seed: 1}, seed: 2}")
    assert load_config(str(path)).run.seed == 2


def test_a_missing_file_is_named():
    with pytest.raises(ConfigError, match="no/such.yaml"):
        load_config("no/such.yaml")


def test_resolved_configuration_reads_back_equal(file):
    config = load_config(file, ["sampling.top_k=5"])
    assert build(Config, yaml.safe_load(to_yaml(config))) == config


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_recipes_are_valid(path):
    from cluster.job_plan import check_config, stored_tokenizer

    config = load_config(str(path))
    check_config(config)
    stored_tokenizer(config)


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "models").glob("*.yaml")), ids=lambda path: path.stem)
def test_models_of_the_zoo_have_the_parameters_they_state(path):
    """Built on torch's meta device, on 16 x 16 codes; each file goes over the recipe of a cluster."""
    from cluster.job_plan import check_config
    from stages.second_stage.transformer import Transformer, num_parameters, transformer_config

    config = load_config([str(ROOT / "configs" / "imagenet.yaml"), str(path)])
    check_config(config)
    stated = re.search(r"# Parameters: ([\d,]+) \((\d+) codes, (\d+) classes\)", path.read_text())
    parameters, codebook_size, num_classes = (int(number.replace(",", "")) for number in stated.groups())
    transformer = transformer_config(
        config.model, config.conditioning, codebook_size=codebook_size, grid=(16, 16), num_classes=num_classes
    )
    with torch.device("meta"):
        model = Transformer(transformer)
    assert sum(p.numel() for p in model.parameters()) == num_parameters(transformer) == parameters


def test_every_option_is_documented_and_the_page_is_current():
    for section in dataclasses.fields(Config):
        for option in dataclasses.fields(section.default):
            assert option.metadata["text"], f"{section.name}.{option.name}"
    assert (
        ROOT / "docs" / "configuration.md"
    ).read_text() == reference_page(), "run: python -m stages.config > docs/configuration.md"
