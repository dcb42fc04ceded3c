"""The search: which combinations it tries, what it refuses, and that what it writes is taken by `-c`."""

import dataclasses

import pytest
from evaluation_support import write_job

from evaluation.records import list_records, read_record
from evaluation.sweep import check_sweep, combinations, deciding_metric, sweep
from stages.config import load_config
from stages.errors import ConfigError
from stages.options import EvaluationOptions, SamplingOptions, SweepOptions


def tried(sampling=SamplingOptions(), **lists):
    return list(combinations(sampling, SweepOptions(**lists)))


def test_every_combination_is_tried_once_and_the_options_as_they_are_first():
    given = SamplingOptions(cfg_scale=2.0)
    found = tried(given, cfg_scale=(2.0, 3.0), top_k=(0, 5))
    assert found[0] == given
    assert {(s.cfg_scale, s.top_k) for s in found} == {(2.0, None), (2.0, 5), (3.0, None), (3.0, 5)} and len(found) == 4


def test_without_guidance_schedules_are_one():
    found = tried(cfg_scale=(1.0, 2.0), cfg_schedule=("constant", "linear"))
    assert [(s.cfg_scale, s.cfg_schedule) for s in found] == [(1.0, "constant"), (2.0, "constant"), (2.0, "linear")]


@pytest.mark.parametrize(
    "settings, words",
    [
        (SweepOptions(), "no list with another value"),
        (SweepOptions(temperature=(0.8, 0.9, 1.0), max_combinations=2), "3 combinations"),
        (SweepOptions(temperature=(0.8, 0.9), num_samples=19), "sweep.num_samples is 19, but .* Raise it to 20"),
    ],
)
def test_what_cannot_be_searched_is_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        check_sweep(list(combinations(SamplingOptions(), settings)), settings, EvaluationOptions())


def deciding(metric, *metrics):
    return deciding_metric(SweepOptions(metric=metric), EvaluationOptions(metrics=metrics))


def test_the_distance_of_the_samples_decides_or_what_is_named():
    assert deciding(None, "psnr", "kd", "fd") == "gfd"
    assert deciding("recall", "fd", "precision_recall") == "recall"


@pytest.mark.parametrize(
    "metric, metrics",
    [
        ("gkd", ["fd"]),  # not measured
        ("psnr", ["fd", "psnr"]),  # the same for every combination
        ("gfd_holdout", ["fd"]),
        ("nearest_training_distance", ["fd", "memorisation"]),  # neither way is better
    ],
)
def test_a_metric_that_cannot_decide_is_refused(metric, metrics):
    with pytest.raises(ConfigError, match=f"sweep.metric is {metric}, but .* samples are better or worse by gfd. Choose"):
        deciding(metric, *metrics)


def test_without_a_distance_a_metric_must_be_named():
    with pytest.raises(ConfigError, match="sweep.metric is not set, but .* better or worse by precision, recall. Choose"):
        deciding(None, "precision_recall", "psnr")


def test_what_the_confirmation_lacks_is_refused_before_the_first_trial(tmp_path):
    options = write_job(tmp_path)
    options = dataclasses.replace(options, evaluation=dataclasses.replace(options.evaluation, num_samples=7))
    with pytest.raises(ConfigError, match="evaluation.num_samples is 7, but .* Raise it to 8"):
        sweep(options, SweepOptions(top_k=(1,), num_samples=16))
    assert list_records(options.evaluation.path) == []


@pytest.mark.ray
def test_a_search_confirms_with_another_seed_and_writes_a_config(ray_cluster, tmp_path):
    options = write_job(tmp_path)
    evaluation = dataclasses.replace(options.evaluation, num_samples=32, num_blocks=2, num_reference_images=20)
    options = dataclasses.replace(options, evaluation=evaluation)
    found = sweep(options, SweepOptions(top_k=(1,), num_samples=16, num_confirmed=1))
    assert found["metric"] == "gfd" and len(found["trials"]) == 2
    values = [trial["value"] for trial in found["confirmed"]]
    assert values == sorted(values) and {trial["top_k"] for trial in found["confirmed"]} >= {None}
    for trial in found["confirmed"]:
        content = read_record(trial["record"]).content
        assert content["seed"] == options.sampling.seed + 1 and content["evaluation"]["num_samples"] == 32
    base = tmp_path / "base.yaml"
    base.write_text("sampling: {seed: 11, top_k: 7}")
    sampling = load_config([str(base), found["config"]]).sampling
    assert (sampling.seed, sampling.top_k) == (11, found["confirmed"][0]["top_k"])
    num_records = len(list_records(options.evaluation.path))
    assert sweep(options, SweepOptions(top_k=(1,), num_samples=16, num_confirmed=1)) == found
    assert len(list_records(options.evaluation.path)) == num_records, "a search again measures nothing"
