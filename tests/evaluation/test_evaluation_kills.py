"""SIGKILL of any actor, of the driver and of the store in each phase: the record is written once, right, or not at all."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from evaluation_support import write_job
from kill_support import fork, wait
from s3_support import BUCKET, Server

from evaluation.evaluate import evaluate
from evaluation.records import list_records, read_record, record_id, record_path, write_record
from evaluation.reference_features import ReferenceOptions
from evaluation.reference_job import make_references
from stages.config import to_dict

ROOT = Path(__file__).resolve().parents[2]
# What a process is called while it is in a phase.
PHASES = {
    "start": "ray::EvaluationActor",
    "sampling": "ray::SamplerActor.images",
    "reference": "ray::FeatureActor.of_reference",
    "holdout": "ray::FeatureActor.of_holdout",
    "neighbours": "ray::FeatureActor.pictures",
}
TITLES = {**PHASES, "Ray Data": "ray::MapWorker(Map(FeatureCalls)).submit"}
WORKING_PHASES = [phase for phase in PHASES if phase != "start"]
VICTIMS = ("SamplerActor", "FeatureActor", "EvaluationActor")
IDENTITY = {"checkpoint_hash": "c"}
CONTENT = {
    "metrics": {"gfd": {"value": 1.5, "standard_error": 0.1, "num_samples": 10}},
    "step": 3,
    "checkpoint": "/run/checkpoints/step-3",
    "created_at": "2026-01-02T00:00:00.000+00:00",
}
GRIDS = {"samples": b"samples", "real": b"real"}


def write_and_die(folder, kill_at):
    """Writes a record, but dies before (even numbers) or after (odd ones) a call of os.link."""
    link, calls = os.link, [0]

    def deadly(*args, **kwargs):
        number, calls[0] = 2 * calls[0], calls[0] + 1
        if number == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        link(*args, **kwargs)
        if number + 1 == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    os.link = deadly
    write_record(folder, record_id(IDENTITY), CONTENT, GRIDS)


def test_a_writer_killed_at_any_point_leaves_a_right_record_or_none(tmp_path):
    num_killed = 0
    for kill_at in range(100):
        folder = tmp_path / str(kill_at)
        was_killed = wait(fork(write_and_die, str(folder), kill_at))
        path = record_path(str(folder), record_id(IDENTITY))
        if os.path.exists(path):
            record = read_record(path)
            assert all((folder / record.grids[name]).read_bytes() == data for name, data in GRIDS.items())
        written = write_record(str(folder), record_id(IDENTITY), CONTENT, GRIDS)
        assert [each.path for each in list_records(str(folder))] == [written.path]
        assert len(list((folder / "history").glob("*.parquet"))) == 1
        if not was_killed:
            break
        num_killed += 1
    assert num_killed == 8, "before and after each of two grids, the record and its rows"


@pytest.fixture(scope="module")
def options(ray_cluster, tmp_path_factory):
    options = write_job(tmp_path_factory.mktemp("kills"))
    metrics = (*options.evaluation.metrics, "memorisation")
    evaluation = dataclasses.replace(options.evaluation, num_sampler_actors=1, item_size=8, metrics=metrics)
    source = dataclasses.replace(options.source, name="distant_scenes:DistantScenes")
    return dataclasses.replace(options, evaluation=evaluation, source=source)


@pytest.fixture(scope="module")
def expected(options):
    """The record that nobody disturbed."""
    return evaluate(options)


def with_path(options, path):
    return dataclasses.replace(options, evaluation=dataclasses.replace(options.evaluation, path=str(path)))


def titles(process):
    """Living processes below one, by what they call themselves."""
    found = {}
    for child in process.children(recursive=True):
        try:
            found[child] = " ".join(child.cmdline())
        except psutil.Error:
            continue
    return found


def wait_for_phase(process, phase, is_over=lambda: False):
    """Waits until some process below this one is in a phase; returns whether it ever was."""
    while not is_over():
        if any(title.startswith(TITLES[phase]) for title in titles(process).values()):
            return True
        time.sleep(0.02)
    return False


def kill_in_phase(victim, phase, stop, killed):
    if wait_for_phase(psutil.Process(), phase, stop.is_set):
        for process, title in titles(psutil.Process()).items():
            if title.startswith(f"ray::{victim}"):
                process.kill()
                killed.append(process.pid)


def check_same(record, expected):
    assert record.id == expected.id and record.metrics == expected.metrics
    folder = record.path[: record.path.index("/records/")]
    assert [each.path for each in list_records(folder)] == [record.path]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("phase", WORKING_PHASES)
@pytest.mark.parametrize("victim", VICTIMS)
def test_an_actor_killed_in_any_phase_changes_no_number(options, expected, tmp_path, victim, phase):
    stop, killed = threading.Event(), []
    killer = threading.Thread(target=kill_in_phase, args=(victim, phase, stop, killed))
    killer.start()
    try:
        record = evaluate(with_path(options, tmp_path))
    finally:
        stop.set()
        killer.join()
    assert killed, "the phase was seen and the victim was there"
    check_same(record, expected)


@pytest.mark.ray
@pytest.mark.slow
def test_an_actor_of_ray_data_killed_while_a_reference_is_made_changes_no_bit(options, expected, tmp_path):
    evaluation = dataclasses.replace(options.evaluation, path=str(tmp_path), item_size=8)
    deciding = ReferenceOptions(source=options.source, images=options.images, evaluation=evaluation)
    stop, killed = threading.Event(), []
    threading.Thread(target=kill_in_phase, args=("MapWorker", "Ray Data", stop, killed), daemon=True).start()
    made = make_references(deciding)
    assert killed and made["references"]["efficientnet-lite0/features"] == expected.content["reference"]


def write_config(options, path):
    """The options as a file that the command line takes."""
    sections = {name: to_dict(getattr(options, name)) for name in ("run", "source", "images", "tokenizer", "codes")}
    sections |= {name: to_dict(getattr(options, name)) for name in ("sampling", "evaluation")}
    path.write_text(json.dumps(sections))
    return str(path)


def start_driver(config, folder):
    """The command in a Ray of its own, whose sockets lie in a short path."""
    os.makedirs(os.path.join(folder, "ray"), exist_ok=True)
    return subprocess.Popen(
        [sys.executable, "ray_job.py", "evaluate", "-c", config, "--json"],
        cwd=ROOT,
        env={**os.environ, "RAY_TMPDIR": folder},
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("phase", PHASES)
def test_the_driver_killed_in_any_phase_leaves_a_right_record_or_none(options, expected, tmp_path, tmp_path_factory, phase):
    again = with_path(options, tmp_path / "evaluation")
    config, folder = write_config(again, tmp_path / "config.json"), str(tmp_path_factory.mktemp("r"))
    driver = start_driver(config, folder)
    assert wait_for_phase(psutil.Process(driver.pid), phase, lambda: driver.poll() is not None)
    os.killpg(driver.pid, signal.SIGKILL)
    driver.communicate()
    assert list_records(again.evaluation.path) == []
    check_same(evaluate(again), expected)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("phase", WORKING_PHASES)
def test_the_store_killed_in_any_phase_leaves_a_right_record_or_none(options, expected, tmp_path, tmp_path_factory, phase):
    (tmp_path / "store").mkdir()
    with Server(str(tmp_path / "store")) as server:
        again = with_path(options, f"s3://{BUCKET}/evaluation")
        config, folder = write_config(again, tmp_path / "config.json"), str(tmp_path_factory.mktemp("r"))
        driver = start_driver(config, folder)
        assert wait_for_phase(psutil.Process(driver.pid), phase, lambda: driver.poll() is not None)
        server.kill()
        _, errors = driver.communicate()
        assert driver.returncode == 1 and "cannot be reached" in errors.splitlines()[-1]
        server.start()
        assert list_records(again.evaluation.path) == []
        driver = start_driver(config, folder)
        output, _ = driver.communicate()
        assert driver.returncode == 0
        check_same(read_record(json.loads(output.splitlines()[-1])["record"]), expected)
