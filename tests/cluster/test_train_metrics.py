"""The live view of a run: what users find on disk, in object storage, in TensorBoard, in Prometheus and in the log."""

import json
import logging
import math
import os
import re
import struct
import time
import urllib.request
from pathlib import Path

import pytest
import ray
import yaml
from ray._private.ray_constants import PROMETHEUS_SERVICE_DISCOVERY_FILE
from s3_support import break_store
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import masked_crc32c

from cluster import live_views
from cluster.train_metrics import TrainMetrics, hours, read_metrics
from pipeline import storage

CLUSTER = Path(__file__).parents[2] / "cluster"
SETTINGS = {"num_steps": 10, "log_every_steps": 5, "codes_per_step": 800, "flop_per_step": 6e9, "peak_flops": 3e9}
SECONDS = {"data": 0.5, "forward": 1.0, "backward": 2.0, "optimizer": 0.25, "checkpoint": 0.25}


def metrics_of(run_path, attempt="a", is_writer=True, **settings):
    return TrainMetrics(str(run_path), attempt, is_writer=is_writer, **{**SETTINGS, **settings})


def record(step, **values):
    return {"step": step, "loss": 7.0 - step, "learning_rate": 1e-3, "grad_norm": 0.5, "digests": ["00ff"], **values}


def lines_of(path):
    return [json.loads(line) for line in storage.read_bytes(str(path)).splitlines()]


def events_of(folder):
    """All events below a folder, in the order in which TensorBoard reads them, every checksum checked."""
    for path in storage.list_files(str(folder)):
        data = storage.read_bytes(path)
        while data:
            length, checksum = data[:8], data[8:12]
            (size,) = struct.unpack("<Q", length)
            content, content_checksum, data = data[12 : 12 + size], data[12 + size : 16 + size], data[16 + size :]
            assert struct.unpack("<I", checksum)[0] == masked_crc32c(length)
            assert struct.unpack("<I", content_checksum)[0] == masked_crc32c(content)
            yield Event.FromString(content)


def until(condition):
    """What a condition gives as soon as it gives something."""
    deadline = time.monotonic() + 60
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


def test_a_step_is_on_disk_as_soon_as_it_ended(tmp_path):
    metrics = metrics_of(tmp_path)
    for step in range(2):
        metrics.record(record(step), SECONDS)
        assert len(lines_of(tmp_path / "metrics" / "a.jsonl")) == step + 1
    first, _ = read_metrics(str(tmp_path))
    assert abs(first.pop("time") - time.time()) < 600
    numbers = {"step": 0, "loss": 7.0, "learning_rate": 1e-3, "grad_norm": 0.5}
    assert first == {**numbers, "seconds": 4.0, "codes_per_second": 200.0, "mfu": 0.5, "part_seconds": SECONDS}
    metrics.close()


def test_without_a_known_peak_there_is_no_mfu(tmp_path):
    metrics = metrics_of(tmp_path, peak_flops=None, log_every_steps=1)
    metrics.record(record(0), SECONDS)
    metrics.close()
    assert "mfu" not in read_metrics(str(tmp_path))[0]


def test_other_ranks_leave_nothing(tmp_path):
    metrics = metrics_of(tmp_path, is_writer=False, log_every_steps=1)
    metrics.record(record(0), SECONDS)
    metrics.commit(1)
    metrics.rollback(0)
    metrics.close()
    assert os.listdir(tmp_path) == []


def test_lines_are_json_whatever_the_loss_is(tmp_path):
    metrics = metrics_of(tmp_path)
    for step, loss in enumerate([math.nan, math.inf]):
        metrics.record(record(step, loss=loss), SECONDS)
    metrics.close()
    text = (tmp_path / "metrics" / "a.jsonl").read_text()
    assert [json.loads(line, parse_constant=pytest.fail)["loss"] for line in text.splitlines()] == [None, None]


def test_steps_that_were_undone_are_not_read(tmp_path):
    """Three attempts whose names are not in their order, the second with a rollback, the third cut off within a line."""
    for attempt, steps in [("c", [0, 1, 2, 3, 4, 5]), ("a", [3, 4, 5, 6, "back to 5", 5]), ("b", [4])]:
        metrics = metrics_of(tmp_path, attempt)
        for step in steps:
            if step == "back to 5":
                metrics.rollback(5)
            else:
                metrics.record(record(step, attempt=ord(attempt)), SECONDS)
        metrics.commit(steps[-1] + 1, validation_nll=6.5)
        metrics.close()
        if attempt == "a":
            assert [line["step"] for line in read_metrics(str(tmp_path))] == [0, 1, 2, 3, 4, 5]
    with open(tmp_path / "metrics" / "b.jsonl", "a") as file:
        file.write('{"step": 5, "lo')
    found = read_metrics(str(tmp_path))
    assert [(line["step"], chr(line["attempt"])) for line in found] == [*zip(range(5), "cccab")]


def test_a_run_without_metrics_has_none(tmp_path):
    assert read_metrics(str(tmp_path)) == []


def test_tensorboard_gets_every_number_and_forgets_what_was_undone(tmp_path):
    metrics = metrics_of(tmp_path)
    metrics.record(record(7), SECONDS)
    metrics.commit(8, validation_nll=6.5)
    metrics.rollback(8)
    metrics.close()
    version, start, step, commit, back = events_of(tmp_path / "tensorboard")
    assert version.file_version == "brain.Event:2"
    assert [(e.step, e.session_log.status) for e in (start, back)] == [(7, SessionLog.START), (8, SessionLog.START)]
    values = {value.tag: value.simple_value for value in step.summary.value}
    expected = {"train/loss": 0.0, "train/learning_rate": 1e-3, "train/grad_norm": 0.5}
    expected |= {"train/seconds": 4.0, "train/codes_per_second": 200.0, "train/mfu": 0.5}
    expected |= {f"step_seconds/{part}": value for part, value in SECONDS.items()}
    assert step.step == 7 and values == pytest.approx(expected)
    (measured,) = commit.summary.value
    assert (commit.step, measured.tag, measured.simple_value) == (8, "commit/validation_nll", 6.5)


@pytest.fixture
def uploads(monkeypatch):
    """Per round of the thread that uploads, which begin ten times a second: the paths that were sent."""
    rounds = []
    replace, upload = storage.replace, live_views.Mirror._upload

    def counted_replace(path, data):
        replace(path, data)
        rounds[-1].append(path)

    def counted_upload(mirror):
        rounds.append([])
        upload(mirror)

    monkeypatch.setattr(live_views, "UPLOAD_SECONDS", 0.1)
    monkeypatch.setattr(storage, "replace", counted_replace)
    monkeypatch.setattr(live_views.Mirror, "_upload", counted_upload)
    return rounds


def next_rounds(uploads):
    """Waits for two whole rounds."""
    begun = len(uploads)
    until(lambda: len(uploads) > begun + 2)


def test_a_run_on_s3_is_seen_while_it_trains_and_whole_at_its_end(s3, uploads):
    metrics = metrics_of(s3)
    metrics.record(record(0), SECONDS)
    until(lambda: storage.exists(f"{s3}/metrics/a.jsonl"))
    metrics.record(record(1), SECONDS)
    until(lambda: len(read_metrics(s3)) == 2)
    next_rounds(uploads)
    begun = len(uploads)
    next_rounds(uploads)
    assert not any(uploads[begun:])  # what did not grow is not sent again
    metrics.record(record(2), SECONDS)
    (folder,) = (view._folder for view in metrics._views if isinstance(view, live_views.Mirror))
    metrics.close()
    assert [line["step"] for line in read_metrics(s3)] == [0, 1, 2]
    assert [event.step for event in events_of(f"{s3}/tensorboard")] == [0, 0, 0, 1, 2]
    assert not os.path.exists(folder)


def warnings_in(caplog):
    return [entry.getMessage() for entry in caplog.records if entry.levelno == logging.WARNING]


def test_a_store_that_is_gone_for_a_while_is_named_once_and_gets_everything_later(s3, monkeypatch, caplog, uploads):
    with monkeypatch.context() as patch:
        _, words = break_store(patch, "no server")
        metrics = metrics_of(s3)
        for step in range(3):
            metrics.record(record(step), SECONDS)
            next_rounds(uploads)
        (warning,) = warnings_in(caplog)
        assert s3 in warning and all(word in warning for word in words), warning
    metrics.close()
    assert len(read_metrics(s3)) == 3
    assert len(warnings_in(caplog)) == 1


def test_a_full_disk_ends_one_view_with_one_warning_and_nothing_else(tmp_path, caplog):
    os.mkdir(tmp_path / "metrics")
    os.symlink("/dev/full", tmp_path / "metrics" / "a.jsonl")
    metrics = metrics_of(tmp_path)
    for step in range(3):
        metrics.record(record(step), SECONDS)
    metrics.close()
    (warning,) = warnings_in(caplog)
    assert "JsonLines" in warning and "No space left on device" in warning
    assert [event.step for event in events_of(tmp_path / "tensorboard")] == [0, 0, 0, 1, 2]


def test_a_folder_that_cannot_be_made_is_warned_about(tmp_path, caplog):
    (tmp_path / "tensorboard").write_text("a file")
    metrics = metrics_of(tmp_path)
    metrics.record(record(0), SECONDS)
    metrics.close()
    (warning,) = warnings_in(caplog)
    assert f"{tmp_path}/tensorboard" in warning
    assert len(read_metrics(str(tmp_path))) == 1


def test_the_progress_line_comes_every_so_many_steps_and_at_the_end(tmp_path, caplog):
    caplog.set_level(logging.INFO, "cluster.train_metrics")
    metrics = metrics_of(tmp_path, num_steps=7, log_every_steps=3)
    for step in range(7):
        metrics.record(record(step), SECONDS)
    metrics.close()
    assert [entry.getMessage().split()[1] for entry in caplog.records] == ["3/7", "6/7", "7/7"]


def test_a_tokenizers_progress_counts_images_and_shows_its_own_numbers(tmp_path, caplog):
    caplog.set_level(logging.INFO, "cluster.train_metrics")
    settings = {"num_steps": 1, "codes_per_step": 16, "peak_flops": None, "unit": "images", "loss_unit": ""}
    metrics = metrics_of(tmp_path, **settings)
    metrics.record(record(0, discriminator=0.9, codebook_usage=0.5), SECONDS)
    metrics.close()
    assert "  4 images/s  discriminator 0.9  codebook_usage 0.5  " in caplog.text
    assert "nats" not in caplog.text
    assert read_metrics(str(tmp_path))[0]["images_per_second"] == 4.0


def test_the_progress_line_says_how_fast_the_typical_step_is(tmp_path, caplog):
    """Nine steps of 4 s and one of 40 s, of which the checkpoint held up 36 s."""
    caplog.set_level(logging.INFO, "cluster.train_metrics")
    metrics = metrics_of(tmp_path, num_steps=1000, log_every_steps=10)
    for step in range(10):
        seconds = {**SECONDS, "checkpoint": 36.25} if step == 9 else SECONDS
        metrics.record(record(step), seconds)
    metrics.close()
    assert caplog.messages == [
        "step 10/1000  loss -2.0000 nats/code  grad norm 0.5  lr 1.00e-03  200 codes/s  MFU 50.0%  "
        "data stall 6.6%  checkpoint stall 50.7%  ETA 1:06:00"
    ]


@pytest.mark.parametrize("seconds, text", [(0, "0:00:00"), (59.6, "0:01:00"), (3723, "1:02:03"), (360000, "100:00:00")])
def test_hours(seconds, text):
    assert hours(seconds) == text


def scraped(prefix, tag):
    """Value by name and tags of everything with a tag that this node tells Prometheus under names with a prefix."""
    url = f"http://{ray.nodes()[0]['NodeManagerAddress']}:{ray.nodes()[0]['MetricsExportPort']}/metrics"
    text = urllib.request.urlopen(url).read().decode()
    found = re.findall(rf"^({prefix}\w*){{(.*)}} (\S+)$", text, re.MULTILINE)
    named = ((name, sorted(re.findall(r'\b((?:run|part)="[^"]*")', tags)), float(value)) for name, tags, value in found)
    return {(name, *tags): value for name, tags, value in named if tag in tags}


@pytest.mark.ray
def test_prometheus_sees_a_run_and_the_dashboard_asks_for_what_is_there(ray_cluster, tmp_path):
    run, tokenizer = str(tmp_path / "run"), str(tmp_path / "tokenizer")

    @ray.remote(num_cpus=0.1)
    class Worker:  # takes plain values only: a worker cannot import this module
        def train(self, run, records, seconds, settings):
            from cluster.train_metrics import TrainMetrics

            metrics = TrainMetrics(run, "a", is_writer=True, **settings)
            for record in records:
                metrics.record(record, seconds)
            metrics.commit(4)
            metrics.commit(4)
            metrics.rollback(4)

    workers = [Worker.remote(), Worker.remote()]
    records = [record(step, grad_norm=0.5 if step == 3 else math.nan) for step in range(4)]
    jobs = {run: SETTINGS, tokenizer: {**SETTINGS, "unit": "images"}}
    ray.get([worker.train.remote(path, records, SECONDS, jobs[path]) for worker, path in zip(workers, jobs, strict=True)])
    tag = f'run="{run}"'
    found = until(lambda: scraped("ray_tessera_train_", tag))
    expected = {
        "step": 4.0,
        "loss": 4.0,
        "grad_norm": 0.5,
        "learning_rate": 1e-3,
        "codes_per_second": 200.0,
        "mfu": 0.5,
        "steps_total": 4.0,
        "commits_total": 2.0,
        "rollbacks_total": 1.0,
    }
    assert {name: found[f"ray_tessera_train_{name}", tag] for name in expected} == expected
    parts = {part: found["ray_tessera_train_step_seconds_total", f'part="{part}"', tag] for part in SECONDS}
    assert parts == {part: 4 * seconds for part, seconds in SECONDS.items()}
    images = until(lambda: scraped("ray_tessera_train_images", f'run="{tokenizer}"'))
    assert list(images.values()) == [200.0]
    dashboard = json.loads((CLUSTER / "grafana" / "training.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    queries += [variable["query"] for variable in dashboard["templating"]["list"] if variable["type"] == "query"]
    asked = set(re.findall(r"\bray_\w+", " ".join(queries)))
    assert all(re.search(r"\bray_\w+", query) for query in queries)
    assert asked == {name for name, *_ in [*found, *images]}


def test_prometheus_looks_where_ray_lists_its_nodes():
    config = yaml.safe_load((CLUSTER / "prometheus" / "prometheus.yml").read_text())
    (job,) = config["scrape_configs"]
    assert job["file_sd_configs"] == [{"files": [f"/tmp/ray/{PROMETHEUS_SERVICE_DISCOVERY_FILE}"]}]
