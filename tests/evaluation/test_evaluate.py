"""Evaluations of an untrained transformer on a tiny tokenizer: small, but every part is the real one."""

import dataclasses
import io
import json
import logging
import math
import os
import signal
import threading
import time

import numpy as np
import psutil
import pytest
import ray
from evaluation_support import GRID, NUM_SAMPLES, STEP, make_checkpoint, make_tokenizer, write_job
from PIL import Image

from cluster.sampler_actor import SamplerActor
from evaluation import evaluate as evaluate_module
from evaluation.actor import EvaluationActor, Measurement
from evaluation.estimates import Estimate
from evaluation.evaluate import EvaluateOptions, evaluate, prepare, verify_record
from evaluation.feature_actor import read_view
from evaluation.prepare import open_training_codes
from evaluation.records import list_records, read_record, write_record
from evaluation.reference import reference_path
from evaluation.reference_features import ReferenceOptions
from evaluation.reference_job import make_references
from evaluation.resources import reserved
from pipeline.code_dataset import CodeDataset
from pipeline.sources import open_source
from stages.errors import ArtefactError, ConfigError, TesseraError
from stages.options import ImageOptions, RunOptions, SamplingOptions, SourceOptions, TokenizerOptions

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def options(ray_cluster, tmp_path_factory) -> EvaluateOptions:
    """A tokenizer, its code dataset, and a checkpoint that belongs to both."""
    return write_job(tmp_path_factory.mktemp("evaluate"))


@pytest.fixture(scope="module")
def record(options):
    """The record of one sampler actor and one feature actor."""
    return evaluate(options)


def with_evaluation(options: EvaluateOptions, **changes) -> EvaluateOptions:
    return dataclasses.replace(options, evaluation=dataclasses.replace(options.evaluation, **changes))


def test_a_record_holds_every_metric_with_its_error(record):
    distances = {"fd_holdout", "rfd", "gfd"}
    others = {"psnr", "ssim", "codebook_usage", "codebook_perplexity", "validation_nll", "validation_bits_per_image"}
    assert set(record.metrics) == distances | others
    for name, metric in record.metrics.items():
        assert metric["num_samples"] == NUM_SAMPLES
        assert metric["standard_error"] is None or metric["standard_error"] > 0
        assert (metric["standard_error"] is None) == (name == "codebook_usage")
        assert ("bias_corrected" in metric) == (name in distances | {"codebook_perplexity"})
    assert record.metrics["fd_holdout"]["value"] < record.metrics["rfd"]["value"]
    bits = record.metrics["validation_nll"]["value"] * GRID[0] * GRID[1] / np.log(2)
    assert record.metrics["validation_bits_per_image"]["value"] == pytest.approx(bits)


def test_a_record_says_what_it_was_made_from(record, options):
    content = record.content
    assert (record.step, content["seed"], content["extractor"]) == (STEP, 5, "efficientnet-lite0@32")
    assert content["distance"] == "Fréchet distance (efficientnet-lite0@32)"
    assert content["subject"] == "checkpoint" and content["reference"]["n"] == 60
    test = content["reference"]["self_test"]
    assert test["damaged"] > 1.2 * test["real"] > 0
    assert os.path.exists(reference_path(options.evaluation.path, content["reference"]["key"]))
    for name in ("tokenizer_fingerprint", "code_dataset_root_hash", "extractor_fingerprint", "checkpoint_hash"):
        assert len(content[name]) == 64
    assert {"sampling", "reference", "holdout", "distance", "total"} <= set(content["wall_seconds"])
    assert content["versions"]["torch"] and content["created_at"].endswith("+00:00")


def test_grids_show_the_same_places_in_rows_of_classes(record, options):
    sizes = set()
    for name in ("samples", "real", "reconstructions"):
        with open(os.path.join(options.evaluation.path, record.grids[name]), "rb") as file:
            with Image.open(io.BytesIO(file.read())) as image:
                sizes.add(image.size)
    assert len(sizes) == 1


def test_the_same_evaluation_is_the_same_record(record, options):
    again = evaluate(with_evaluation(options, num_sampler_actors=2))
    assert again == record
    assert [each.path for each in list_records(options.evaluation.path)] == [record.path]


def kill_one_of_each(kinds: list[str], stop: threading.Event) -> None:
    """Kills the first process of each kind of actor that it finds among our children, and takes it off the list."""
    while kinds and not stop.wait(0.05):
        for process in psutil.Process().children(recursive=True):
            try:
                title = " ".join(process.cmdline())
                for kind in [kind for kind in kinds if title.startswith(f"ray::{kind}")]:
                    process.send_signal(signal.SIGKILL)
                    kinds.remove(kind)
            except psutil.Error:
                continue


def test_more_actors_and_a_kill_in_each_kind_change_no_number(record, options, tmp_path):
    alive, stop = ["SamplerActor", "FeatureActor", "EvaluationActor"], threading.Event()
    killer = threading.Thread(target=kill_one_of_each, args=(alive, stop))
    killer.start()
    try:
        again = evaluate(with_evaluation(options, path=str(tmp_path), num_sampler_actors=2, num_feature_actors=2))
    finally:
        stop.set()
        killer.join()
    assert not alive
    assert again.id == record.id and again.metrics == record.metrics
    for name in record.grids:
        with open(os.path.join(options.evaluation.path, record.grids[name]), "rb") as first:
            assert first.read() == (tmp_path / again.grids[name]).read_bytes()


def test_a_record_is_verified_by_measuring_again_and_a_wrong_one_is_not(record, options, tmp_path):
    wrong = json.loads(json.dumps({name: record.content[name] for name in record.content if name != "grids"}))
    wrong["metrics"]["gfd"]["value"] *= 1.00001
    assert wrong["device"] == "CPU"
    wrong["device"] = "GPU H100"
    forged = write_record(str(tmp_path), "0" * 32, {k: v for k, v in wrong.items() if k != "sha256"}, {})
    other_defaults = dataclasses.replace(with_evaluation(options, num_samples=24), sampling=SamplingOptions())
    problems = verify_record(forged.path, other_defaults)
    assert len(problems) == 2 and problems[0].startswith("gfd value: the record has")
    assert "measured on GPU H100, and here on CPU" in problems[1]


@pytest.fixture(scope="module")
def rich_record(options, tmp_path_factory):
    """A tokenizer measured alone, with every metric that needs no other weights."""
    metrics = ("fd", "kd", "precision_recall", "density_coverage", "memorisation", "psnr", "ssim", "codebook")
    folder = str(tmp_path_factory.mktemp("rich"))
    rich = with_evaluation(options, metrics=metrics, path=folder, num_pairwise_images=50)
    return evaluate(dataclasses.replace(rich, checkpoint=None)), rich


def test_a_tokenizer_is_measured_alone(rich_record, options):
    record, _ = rich_record
    content = record.content
    assert content["subject"] == "tokenizer" and content["checkpoint"] == options.tokenizer.path
    assert content["checkpoint_hash"] == content["tokenizer_fingerprint"]
    distances = {"fd_holdout", "rfd", "kd_holdout", "rkd"}
    real = {"precision_holdout", "recall_holdout", "density_holdout", "coverage_holdout"}
    others = {"nearest_training_distance_holdout", "psnr", "ssim", "codebook_usage", "codebook_perplexity"}
    assert set(record.metrics) == distances | real | others
    assert set(record.grids) == {"real", "reconstructions", "side_by_side"}
    assert "sampling" not in content["wall_seconds"]


def test_a_tokenizers_record_is_verified_and_found_again(rich_record, options):
    record, rich = rich_record
    assert evaluate(dataclasses.replace(rich, checkpoint=None)) == record
    assert verify_record(record.path, with_evaluation(rich, num_feature_actors=2, item_size=8)) == []


@pytest.fixture(scope="module")
def full_record(options, tmp_path_factory):
    """A checkpoint measured with every metric that needs no other weights."""
    metrics = ("fd", "kd", "precision_recall", "density_coverage", "memorisation", "psnr", "codebook", "likelihood")
    full = with_evaluation(options, metrics=metrics, path=str(tmp_path_factory.mktemp("full")), num_pairwise_images=50)
    return evaluate(full), full


def test_memorisation_is_measured_over_features_and_codes(full_record):
    record, full = full_record
    over_features = {"nearest_training_distance", "nearest_training_distance_holdout", "copied_share"}
    over_codes = {"nearest_training_codes", "nearest_training_codes_holdout", "copied_code_share"}
    assert over_features | over_codes <= set(record.metrics)
    for name in over_codes:
        metric = record.metrics[name]
        assert 0.0 <= metric["value"] <= 1.0 and metric["num_samples"] == NUM_SAMPLES
        assert metric["standard_error"] > 0 or name == "copied_code_share"
    root_hash = CodeDataset.open(full.codes.path, verify=False).root_hash
    assert record.content["identity"]["training_codes_root_hash"] == root_hash


def tiles_in(options, record, name, width):
    """The tiles of a grid of images of 16 pixels, which it enlarges by 4, without the white places at its end."""
    with Image.open(os.path.join(options.evaluation.path, record.grids[name])) as picture:
        pixels = np.asarray(picture)
    places = [(y, x) for y in range(0, pixels.shape[0], 64 + 2) for x in range(0, pixels.shape[1], width + 2)]
    tiles = [pixels[y : y + 64 : 4, x : x + width : 4] for y, x in places]
    return [tile for tile in tiles if (tile != 255).any()]


def test_samples_are_shown_beside_training_images(full_record):
    record, full = full_record
    assert set(record.grids) == {"samples", "neighbours", "real", "reconstructions"}
    assert record.content["wall_seconds"]["neighbours"] > 0
    source = open_source(full.source, full.images)
    uris = source.list_images("train")["uri"].to_pylist()
    views = {read_view(source, uri, full.images, full.tokenizer).tobytes() for uri in uris}
    samples, pairs = (tiles_in(full, record, name, width) for name, width in (("samples", 64), ("neighbours", 128)))
    assert len(pairs) == len(record.content["layouts"]["samples"]["labels"])
    assert [pair[:, :16].tobytes() for pair in pairs] == [sample.tobytes() for sample in samples]
    assert all(pair[:, 16:].tobytes() in views for pair in pairs)


@pytest.mark.slow
def test_memorisation_is_the_same_on_more_actors_and_other_items(full_record):
    record, full = full_record
    more = with_evaluation(full, num_sampler_actors=2, num_feature_actors=2, item_size=8)
    assert verify_record(record.path, more) == []


def test_samples_that_are_codes_of_training_images_are_found(full_record, monkeypatch):
    record, full = full_record
    assignment = prepare(full).assignment
    training = assignment.training_codes.choose(1000).astype(np.int64)

    class Copier(SamplerActor):
        """Every second sample is a row of the training data."""

        def codes(self, start, stop):
            rows = np.arange(start, stop)
            copied = training[rows % len(training)]
            return np.where(rows[:, None] % 2 == 0, copied, super().codes(start, stop))

    monkeypatch.setattr("evaluation.actor.SamplerActor", Copier)
    with reserved(assignment.evaluation) as group:
        metrics = EvaluationActor(assignment, group).measure().metrics
    before = {name: record.metrics[name]["value"] for name in metrics}
    assert metrics["copied_code_share"].value >= 0.5 > before["copied_code_share"] + 0.2
    assert metrics["nearest_training_codes"].value >= 0.5 > before["nearest_training_codes"]
    for name in ("nearest_training_codes_holdout", "nearest_training_distance_holdout"):
        assert metrics[name].value == before[name]


def test_an_imported_checkpoint_is_compared_with_codes_of_its_tokenizer_alone(options, tmp_path):
    dataset = CodeDataset.open(options.codes.path, verify=False)
    commit = make_checkpoint(str(tmp_path), dataset, root_hash=None, imported={})
    measured = with_evaluation(options, metrics=("memorisation",))
    preparation = prepare(dataclasses.replace(measured, checkpoint=commit.path))
    assert preparation.identity["code_dataset_root_hash"] is None
    assert preparation.identity["training_codes_root_hash"] == dataset.root_hash
    assert preparation.assignment.training_codes.root_hash == dataset.root_hash
    dataset.tokenizer_fingerprint = "e" * 64
    with pytest.raises(ArtefactError, match="codes.path is .* of tokenizer e{64}, but memorisation compares"):
        open_training_codes(dataset, commit)


def test_statistics_of_a_file_serve_in_place_of_the_training_images(record, options, tmp_path):
    evaluation = dataclasses.replace(options.evaluation, path=str(tmp_path), num_feature_actors=2)
    deciding = ReferenceOptions(source=options.source, images=options.images, evaluation=evaluation)
    made = make_references(deciding, str(tmp_path / "statistics.npz"))
    assert made["references"]["efficientnet-lite0/features"] == record.content["reference"], "by Ray Data the same to the last bit"
    against = with_evaluation(options, reference_path=str(tmp_path / "statistics.npz"), path=str(tmp_path))
    found = evaluate(against)
    assert found.id != record.id and found.content["reference"]["n"] == 60
    for name in ("fd_holdout", "rfd", "gfd"):
        assert found.metrics[name]["value"] == pytest.approx(record.metrics[name]["value"], rel=1e-6)
    tested = found.content["reference"]["self_test"]
    assert tested["damaged"] > 1.2 * tested["real"], "its extractor is tested here, as the file does not say that it was"
    assert verify_record(found.path, with_evaluation(against, reference_path=None)) == [], "the record knows its file"
    with pytest.raises(ConfigError, match="evaluation.reference_path is given, but kd needs the features"):
        prepare(with_evaluation(against, metrics=("fd", "kd")))


def test_a_record_of_other_images_does_not_verify_and_says_why(record, options):
    other = dataclasses.replace(options, source=dataclasses.replace(options.source, seed=9))
    problems = verify_record(record.path, other)
    assert [problem.split(":")[0] for problem in problems] == ["holdout_key", "reference_keys"]


def test_seed_and_sampling_make_another_record_actors_and_grids_do_not(record, options):
    same = with_evaluation(options, num_feature_actors=3, num_grid_images=4, item_size=8)
    assert prepare(same).identity == record.content["identity"]
    for other in (
        dataclasses.replace(options, seed=6),
        dataclasses.replace(options, sampling=dataclasses.replace(options.sampling, temperature=0.9)),
        with_evaluation(options, num_samples=32),
        with_evaluation(options, extractor_resolution=64),
        with_evaluation(options, num_reference_images=30),
        with_evaluation(options, metrics=("fd", "psnr")),
    ):
        assert prepare(other).identity != record.content["identity"]


def test_parts_that_do_not_belong_together_are_refused_by_name(options, tmp_path):
    fingerprint = make_tokenizer(str(tmp_path / "tokenizer"), seed=1)
    other_tokenizer = dataclasses.replace(options, tokenizer=TokenizerOptions(path=str(tmp_path / "tokenizer")))
    with pytest.raises(ArtefactError, match=f"tokenizer.path is .*{fingerprint}.* trained on codes of tokenizer"):
        evaluate(other_tokenizer)
    other_codes = CodeDataset.open(options.codes.path, verify=False)
    other_codes.root_hash = "e" * 64
    commit = make_checkpoint(str(tmp_path / "run"), other_codes)
    with pytest.raises(ArtefactError, match="codes.path is .* trained on the code dataset with root hash e{64}"):
        evaluate(dataclasses.replace(options, checkpoint=commit.path))
    with pytest.raises(ConfigError, match="images.size is 32"):
        evaluate(dataclasses.replace(options, images=ImageOptions(size=32)))


def test_what_cannot_be_measured_is_refused_before_any_work(options, tmp_path):
    with pytest.raises(ConfigError, match="evaluation.num_samples is 7, but .* Raise it to 8"):
        evaluate(with_evaluation(options, num_samples=7))
    few = dataclasses.replace(options, source=dataclasses.replace(options.source, num_holdout_images=7))
    with pytest.raises(ConfigError, match="source.name is scenes with 7 held-out images, but .* Hold out more"):
        evaluate(few)
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    same = SourceOptions(name="image-folder", path=str(tmp_path), holdout_path=str(tmp_path))
    with pytest.raises(ConfigError, match="source.holdout_path is .*, but 1 of its images are among those of source.path"):
        evaluate(dataclasses.replace(options, source=same))
    with pytest.raises(ConfigError, match="evaluation.extractor is inception"):
        evaluate(with_evaluation(options, extractor="inception"))
    with pytest.raises(ConfigError, match="evaluation.metrics names fdi, but it must name some of: fd, fid"):
        evaluate(with_evaluation(options, metrics=("fdi",)))
    with pytest.raises(ConfigError, match="inception-v3 needs weights-inception-2015-12-05-6726825d.pth in it. Put http"):
        evaluate(with_evaluation(options, metrics=("fid",), weights_path=str(tmp_path)))
    depth = dataclasses.replace(options, tokenizer=dataclasses.replace(options.tokenizer, input="depth"))
    with pytest.raises(ConfigError, match="tokenizer.input is depth, but samples are measured as images"):
        evaluate(depth)
    with pytest.raises(ConfigError, match="names fd, but .* of maps of numbers are measured by psnr, ssim, codebook"):
        evaluate(dataclasses.replace(depth, checkpoint=None))
    with pytest.raises(ConfigError, match="names mean_iou, but tokenizer.input is image, .* of images are measured by fd, fid"):
        evaluate(with_evaluation(options, metrics=("mean_iou",)))
    for changes, message in (({"channels": 1}, "images.channels is 1, but .* takes 3 channels"), ({"size": 18}, "images.size is 18")):
        other = dataclasses.replace(options, images=dataclasses.replace(options.images, **changes), checkpoint=None)
        with pytest.raises(ConfigError, match=message):
            evaluate(other)
    with pytest.raises(ArtefactError, match="no committed checkpoint"):
        evaluate(dataclasses.replace(options, run=RunOptions(path=str(tmp_path / "none"))))
    with pytest.raises(ArtefactError, match="no such file"):
        verify_record(str(tmp_path / "none.json"), options)


@pytest.mark.parametrize("numbers", [(math.nan, 1.0, 1.0), (1.0, math.nan, 1.0), (1.0, 1.0, math.inf)])
def test_numbers_that_are_not_finite_make_no_record(options, tmp_path, monkeypatch, numbers):
    value, error, corrected = numbers
    estimate = Estimate(value, NUM_SAMPLES, error, corrected)
    found = Measurement(metrics={"gfd": estimate}, grids={}, layouts={}, references={}, num_unusable=0, wall_seconds={})
    monkeypatch.setattr(evaluate_module, "measure", lambda *given: found)
    path = str(tmp_path / "evaluation")
    with pytest.raises(TesseraError, match="gfd has the .* (nan|inf), but a record holds finite numbers"):
        evaluate(with_evaluation(options, path=path))
    assert list_records(path) == []


def test_fewer_held_out_images_than_samples_are_warned_of(options, caplog):
    with caplog.at_level(logging.WARNING, logger="evaluation.prepare"):
        preparation = prepare(with_evaluation(options, num_samples=64))
    assert len(preparation.assignment.holdout_uris) == 48
    assert "there are 48 held-out images" in caplog.text


def test_records_of_an_evaluation_read_back(record):
    assert read_record(record.path) == record


def test_what_the_cluster_has_no_room_for_is_said_and_leaves_no_record(options, tmp_path):
    crowded = with_evaluation(
        options, path=str(tmp_path), num_feature_actors=3, cpus_per_actor=1.0, start_timeout_seconds=1.0
    )
    with pytest.raises(TesseraError, match="needs 4 times 1 CPU, but the cluster has 2 CPU, of which .* CPU free"):
        evaluate(crowded)
    unknown = with_evaluation(options, path=str(tmp_path), actor_resource="evaluation", start_timeout_seconds=1.0)
    with pytest.raises(TesseraError, match="0 evaluation"):
        evaluate(unknown)
    assert list_records(str(tmp_path)) == []
    wait_until_free()


def wait_until_free():
    """Nothing that an evaluation reserved stays reserved."""
    while ray.available_resources().get("CPU") != 2.0:
        time.sleep(0.1)


def test_a_record_verifies_on_other_actors_with_another_batch_size(record, options):
    assert verify_record(record.path, with_evaluation(options, num_sampler_actors=2, item_size=8)) == []
