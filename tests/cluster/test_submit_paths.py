"""`submit` knows every section of a configuration from which a command takes paths."""

import dataclasses

import pytest
from cluster_support import ROOT

import ray_job
from cluster import submit
from cluster.sample_job import SampleJobOptions
from cluster.tokenizer_options import TokenizerJobOptions
from cluster.train_options import TrainJobOptions
from evaluation.evaluate import EvaluateOptions
from evaluation.reference_features import ReferenceOptions
from pipeline.job_options import PATHS
from pipeline.sources.map_files import MAP_KEYS
from pipeline.tokenize_images import TokenizeOptions
from stages.config import load_config
from stages.errors import ConfigError
from stages.options import Config


def test_every_command_with_a_configuration_has_its_paths_checked(monkeypatch):
    monkeypatch.chdir(ROOT)
    config = load_config("configs/demo.yaml")
    commands = ray_job.build_parser()._subparsers._group_actions[0].choices
    configured = {name for name, parser in commands.items() if "-c" in parser._option_string_actions}
    assert set(submit.SECTIONS) == configured
    for sections in submit.SECTIONS.values():
        assert set(sections) <= {field.name for field in dataclasses.fields(config)}


# Sections that a command takes whose paths it does not use.
UNUSED = {"train-tokenizer": {"run"}, "evaluate": {"sampling"}, "nightly": {"sampling"}}


@pytest.mark.parametrize(
    "command, options",
    [
        ("train-tokenizer", TokenizerJobOptions),
        ("tokenize", TokenizeOptions),
        ("train", TrainJobOptions),
        ("sample", SampleJobOptions),
        ("evaluate", EvaluateOptions),
        ("reference", ReferenceOptions),
        ("nightly", EvaluateOptions),
    ],
)
def test_every_section_that_a_command_takes_has_its_paths_checked(command, options):
    taken = {field.name for field in dataclasses.fields(options)} - UNUSED.get(command, set())
    sections = {field.name: {key.name for key in dataclasses.fields(field.type)} for field in dataclasses.fields(Config)}
    with_paths = {name for name, keys in sections.items() if keys & {*PATHS, *MAP_KEYS}}
    assert taken & with_paths <= set(submit.SECTIONS[command])


@pytest.mark.parametrize(
    "source, is_refused", [("pictures", True), ("/shared/pictures", False), ("s3://bucket/x", False), ("scenes", False)]
)
def test_the_source_of_a_demo_is_a_path_unless_it_is_a_name(source, is_refused):
    words = ["demo", "--output", "/shared/out", "--source", source]
    parsed = ray_job.build_parser().parse_args(words)
    if not is_refused:
        assert submit.check_command(words, parsed) == tuple(words)
        return
    with pytest.raises(ConfigError, match="--source is pictures, but"):
        submit.check_command(words, parsed)
