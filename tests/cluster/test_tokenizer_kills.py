"""SIGKILL at every point of a tokenizer's training: the same command goes on in the middle of an epoch, with the same rows and losses.

Deaths at named points happen in bare process groups; workers and drivers of Ray are killed from outside.
"""

import functools
import itertools
import os
import random
import signal
import time

import pytest
import torch.multiprocessing
from cluster_support import running_cluster, wait_until
from tests_support import kill_at_call, tiny_config
from tokenizer_support import begin, numbers_of, options_for, train

from cluster import checkpointer, checkpoints, tokenizer_loop
from cluster.tokenizer_options import TokenizerJobOptions, training_path
from cluster.verify_run import verify_run
from stages.config import select_sections, to_yaml

TARGETS = {
    "step": (tokenizer_loop.TokenizerStage, "step", 5),
    "save": (tokenizer_loop.TokenizerStage, "save", 2),
    "publish": (checkpointer.Checkpointer, "_publish", 2),
    "commit": (checkpoints, "write_commit", 2),
    "committed": (checkpoints, "write_commit", 2),
}
TRAIN = {"num_samples": 144, "discriminator_start_samples": 32, "lecam_weight": 0.1, "revive_every_steps": 2}


def die_at(point, rank):
    """Makes a rank kill itself at a point: before the call, or after it for "committed"."""
    if os.environ["RANK"] == str(rank):
        owner, name, number = TARGETS[point]
        kill_at_call(owner, name, number, is_after=point == "committed")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Numbers of every step, and the sample-log hash, of a training that nobody disturbs, by world size."""

    @functools.cache
    def run(world_size):
        options = options_for(tmp_path_factory.mktemp("undisturbed"), tokenizer_train=TRAIN)
        commit = train(options, world_size)
        return numbers_of(options, commit), commit.content["sample_log_hash"]

    return run


QUICK = [("commit", 2)]
SLOW = [case for case in itertools.product(TARGETS, [1, 2]) if case not in QUICK]


@pytest.mark.parametrize("point, world_size", QUICK + [pytest.param(*case, marks=pytest.mark.slow) for case in SLOW])
def test_a_death_at_any_point_changes_nothing(tmp_path, undisturbed, point, world_size):
    options, (numbers, log_hash) = options_for(tmp_path, tokenizer_train=TRAIN), undisturbed(world_size)
    rank = 0 if point in ("commit", "committed") else world_size - 1
    processes = begin(options, world_size, functools.partial(die_at, point, rank))
    with pytest.raises(torch.multiprocessing.ProcessExitedException, match="SIGKILL"):
        while not processes.join():
            pass
    run_path = training_path(options.tokenizer.path)
    found = checkpoints.latest_commit(run_path)
    assert found is not None and found.step == (6 if point == "committed" else 3)
    commit = train(options, world_size)
    assert commit.step == 9 and commit.content["sample_log_hash"] == log_hash
    assert numbers_of(options, commit) == numbers
    assert verify_run(run_path) == []


LONG = {**TRAIN, "precision": "fp32", "num_samples": 1600, "checkpoint_every_steps": 5, "log_every_steps": 1, "min_crop": 0.7}


@pytest.mark.ray
@pytest.mark.slow
def test_processes_of_ray_are_killed(tmp_path):
    """Worker, driver, everything: with 60 images in batches of 16, nearly every kill falls into the middle of an epoch."""
    scaling = {"num_workers": 2, "threads_per_worker": 1, "max_failures": 5}
    config = tiny_config(tmp_path, tokenizer_train=LONG, scaling=scaling)
    path, choice = str(tmp_path / "config.yaml"), random.Random(0)
    with open(path, "w") as file:
        file.write(to_yaml(config))
    options = select_sections(TokenizerJobOptions, config)
    run_path = training_path(options.tokenizer.path)

    def committed():
        newest = checkpoints.newest_commit(run_path)
        return 0 if newest is None else newest.step

    with running_cluster((2, 2)) as cluster:
        driver = None
        for victim in ("worker", "driver", "worker", "driver"):
            if driver is None:
                driver = cluster.start("ray_job.py", "train-tokenizer", "-c", path)
            before = committed()
            wait_until(lambda: committed() > before, "another commit", driver, seconds=300)
            time.sleep(choice.random())
            if victim == "worker":
                cluster.train_worker(choice.randrange(2)).kill()
            else:
                os.killpg(driver.pid, signal.SIGKILL)
                driver.communicate()
                driver = None
        driver = driver or cluster.start("ray_job.py", "train-tokenizer", "-c", path)
        _, error = driver.communicate(timeout=500)
        assert driver.returncode == 0, error[-3000:]
    disturbed = checkpoints.latest_commit(run_path)
    whole = options_for(tmp_path / "whole", tokenizer_train=LONG)
    expected = train(whole, 2)
    assert disturbed.step == expected.step == 100
    assert disturbed.content["sample_log_hash"] == expected.content["sample_log_hash"]
    assert numbers_of(options, disturbed) == numbers_of(whole, expected)
    assert verify_run(run_path) == []
