"""Groups of workers follow each other as long as each commits something."""

import contextlib
import os

import pytest
import ray.train

from cluster import checkpoints, worker_group
from stages.errors import ConfigError, StorageError
from stages.options import ScalingOptions


class NeverStopped:
    is_made = False

    def on_sigterm(self):
        return contextlib.nullcontext()


@pytest.fixture
def run_groups(tmp_path, monkeypatch):
    """Runs groups of which each commits the next of `steps` and fails with `error`, or succeeds at step 50."""
    run_path = str(tmp_path / "run")

    def run(steps, error, look=lambda commit: None):
        left = iter(steps)

        def run_workers(*args, **kwargs):
            step = next(left)
            folder = checkpoints.checkpoint_path(run_path, step, checkpoints.new_attempt())
            os.makedirs(folder)
            look(checkpoints.write_commit(folder, {"step": step, "files": []}))
            if step < 50:
                raise error

        monkeypatch.setattr(worker_group, "StopRequest", NeverStopped)
        monkeypatch.setattr(worker_group, "run_workers", run_workers)
        return worker_group.run_to_the_end(None, None, ScalingOptions(), run_path, 50)

    return run


FAULTS = [ray.train.TrainingFailedError("a worker died"), StorageError("run.path is s3://b, but the store cannot be reached")]


@pytest.mark.parametrize("error", FAULTS, ids=["worker", "store"])
def test_faults_do_not_end_a_run_that_gets_on(run_groups, error):
    assert run_groups([10, 20, 30, 50], error).step == 50


@pytest.mark.parametrize("error", FAULTS, ids=["worker", "store"])
def test_faults_end_a_run_that_does_not_get_on(run_groups, error):
    with pytest.raises(type(error)):
        run_groups([10, 10, 50], error)


def test_a_damaged_commit_that_workers_pass_over_does_not_hide_what_they_commit(run_groups, tmp_path):
    run_path = str(tmp_path / "run")
    folder = checkpoints.checkpoint_path(run_path, 40, checkpoints.new_attempt())
    os.makedirs(folder)
    missing = {"path": "weights", "bytes": 7, "xxh3_128": ""}
    checkpoints.write_commit(folder, {"step": 40, "files": [missing]})
    assert run_groups([10, 20, 50], FAULTS[0], lambda commit: checkpoints.set_aside_damaged(run_path, commit)).step == 50


def test_a_store_that_fails_when_the_driver_looks_too_is_asked_again(run_groups, monkeypatch):
    answers, failures = checkpoints.newest_commit, iter([True, True, False, True])

    def newest_commit(run_path):
        if next(failures, False):
            raise FAULTS[1]
        return answers(run_path)

    monkeypatch.setattr(checkpoints, "newest_commit", newest_commit)
    monkeypatch.setattr(worker_group, "RETRY_SECONDS", 0.0)
    assert run_groups([10, 20, 50], FAULTS[1]).step == 50


def test_an_error_of_the_user_ends_a_run(run_groups):
    with pytest.raises(ConfigError):
        run_groups([10, 20, 50], ConfigError("train.precision is fp8, but it must be bf16. Change it."))
