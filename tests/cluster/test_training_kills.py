"""SIGKILL at every point of a training run: it goes on from a verified commit and consumes the rows that it would have consumed.

Deaths at named points happen in bare process groups; workers, raylets and drivers of Ray are killed from outside.
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
from job_support import write_train_job
from tests_support import kill_at_call
from train_support import RECIPE, losses, options_for, train

from cluster import checkpointer, checkpoints, train_loop, universal
from cluster.train_metrics import read_metrics
from cluster.verify_run import verify_run

TRAIN = {"num_steps": 9, "checkpoint_every_steps": 3}
POINTS = ("step", "save", "publish", "commit", "committed", "prune")
TARGETS = {
    "step": (train_loop, "train_step"),
    "save": (train_loop, "save_engine"),
    "publish": (checkpointer.Checkpointer, "_publish"),
    "commit": (checkpoints, "write_commit"),
    "committed": (checkpoints, "write_commit"),
    "prune": (checkpoints, "prune"),
    "convert": (universal, "convert"),
}
# At which call of a point to die; the second checkpoint's, if not given. Before that one starts, the first is committed, however slow.
CALLS = {"step": 8, "prune": 1, "convert": 1}


def die_at(point, rank):
    """Makes a rank kill itself at a point: before the call, or after it for "committed"."""
    if os.environ["RANK"] == str(rank):
        kill_at_call(*TARGETS[point], CALLS.get(point, 2), is_after=point == "committed")


@pytest.fixture(scope="module")
def codes(tmp_path_factory):
    return RECIPE.write(tmp_path_factory.mktemp("codes"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, codes):
    """The latest commit of a run that nobody disturbs, by ZeRO stage and world size."""

    @functools.cache
    def run(zero_stage, world_size):
        return train(options(tmp_path_factory.mktemp("undisturbed"), codes, zero_stage), world_size)

    return run


def options(folder, codes, zero_stage):
    sections = {"deepspeed": {"zero_stage": zero_stage}, "optim": {"weight_average_decay": 0.9}, "train": TRAIN}
    return options_for(folder, codes, **sections, scaling={"num_workers": [1, 4]})


def dies(job, world_size, point, rank):
    """Runs the loop with a rank that dies at a point."""
    with pytest.raises(torch.multiprocessing.ProcessExitedException) as caught:
        train(job, world_size, functools.partial(die_at, point, rank))
    assert "SIGKILL" in str(caught.value)


QUICK = [("step", 1, 2), ("commit", 3, 2)]
SLOW = [
    (point, stage, world_size)
    for point, (stage, world_size) in itertools.product(POINTS, [(1, 1), (1, 2), (2, 2), (3, 2), (2, 4), (3, 4)])
    if (point, stage, world_size) not in QUICK
]


@pytest.mark.parametrize(
    "point, zero_stage, world_size", QUICK + [pytest.param(*case, marks=pytest.mark.slow) for case in SLOW]
)
def test_a_death_at_any_point_changes_nothing(tmp_path, codes, undisturbed, point, zero_stage, world_size):
    job, expected = options(tmp_path, codes, zero_stage), undisturbed(zero_stage, world_size)
    only_rank_0 = point in ("commit", "committed", "prune")
    dies(job, world_size, point, 0 if only_rank_0 else world_size - 1)
    found = checkpoints.latest_commit(job.run.path)
    assert found is not None and found.step >= (6 if point == "committed" else 3)
    check_same(job, train(job, world_size), expected)


def check_same(job, commit, expected):
    assert commit.step == expected.step
    assert commit.content["sample_log_hash"] == expected.content["sample_log_hash"]
    assert losses(commit) == losses(expected)
    assert verify_run(job.run.path) == []


@pytest.mark.parametrize(
    "before, after",
    [pytest.param((3, 2), (1, 1), marks=pytest.mark.slow), pytest.param((1, 4), (2, 2), marks=pytest.mark.slow)],
)
def test_a_death_while_a_checkpoint_is_converted_changes_nothing(tmp_path, codes, undisturbed, before, after):
    train(options(tmp_path, codes, before[0]), before[1])
    job = options(tmp_path, codes, after[0])
    checkpoints.retire_after(job.run.path, 3)
    dies(job, after[1], "convert", 0)
    commit = train(job, after[1])
    expected = undisturbed(*before)
    assert commit.content["sample_log_hash"] == expected.content["sample_log_hash"]
    assert losses(commit) == pytest.approx(losses(expected), rel=1e-4)
    assert verify_run(job.run.path) == []


STEPS = {"num_steps": 160, "checkpoint_every_steps": 10, "keep_checkpoints": 2, "spike_threshold": 0.0}


def ray_job_config(folder, **sections):
    scaling = {"num_workers": 2, "cpus_per_worker": 1, "max_failures": 5, **sections.pop("scaling", {})}
    return write_train_job(str(folder), train={**STEPS, **sections.pop("train", {})}, scaling=scaling, **sections)


def run_to_the_end(cluster, config):
    driver = cluster.start("ray_job.py", "train", "-c", config)
    out, error = driver.communicate(timeout=400)
    assert driver.returncode == 0, error[-3000:]


def newest(folder):
    return checkpoints.latest_commit(str(folder / "run"))


def check_finished(folder):
    """The run has every step, each with the rows that its code dataset prescribes for it."""
    assert newest(folder).step == STEPS["num_steps"]
    assert verify_run(str(folder / "run")) == []


def steps_committed(folder):
    commits = checkpoints.list_commits(str(folder / "run"))
    return commits[-1].step if commits else 0


def kill_something(cluster, driver, victim, choice):
    """Kills one thing; returns whether the driver must be started again."""
    if victim == "worker":
        cluster.train_worker(choice.randrange(2)).kill()
    elif victim == "raylet":
        cluster.kill_raylet(choice.choice(cluster.nodes[1:]))
        cluster.add_node(1)
    elif victim == "driver":
        os.killpg(driver.pid, signal.SIGKILL)
    else:
        os.killpg(driver.pid, signal.SIGKILL)
        for node in cluster.nodes[1:]:
            cluster.kill_node(node)
        cluster.add_node(1)
        cluster.add_node(1)
    return victim in ("driver", "all")


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1800)  # eight restarts of everything, on whatever machine
@pytest.mark.parametrize(
    "victims, zero_stage",
    [
        (("worker", "raylet", "driver"), 1),
        (("worker", "driver", "all", "raylet", "worker", "all", "driver", "raylet"), 2),
        (("all", "raylet", "worker", "driver", "raylet", "worker", "driver", "all"), 3),
    ],
)
def test_processes_of_ray_are_killed(tmp_path, victims, zero_stage):
    config, choice = ray_job_config(tmp_path, deepspeed={"zero_stage": zero_stage}), random.Random(zero_stage)
    with running_cluster((0, 1, 1)) as cluster:
        driver = None
        for number, victim in enumerate(victims):
            if driver is None:
                driver = cluster.start("ray_job.py", "train", "-c", config)
            before = steps_committed(tmp_path)
            wait_until(lambda: steps_committed(tmp_path) > before, "another commit", driver, seconds=200)
            time.sleep(choice.random())
            if kill_something(cluster, driver, victim, choice):
                driver.communicate()
                driver = None
            assert newest(tmp_path) is not None
        if driver is None:
            run_to_the_end(cluster, config)
        else:
            _, error = driver.communicate(timeout=400)
            assert driver.returncode == 0, error[-3000:]
    check_finished(tmp_path)


@pytest.mark.ray
@pytest.mark.slow
def test_a_lost_node_shrinks_the_run_and_a_new_one_grows_it(tmp_path):
    scaling = {"num_workers": [1, 2], "resize_every_seconds": 2.0}
    config = ray_job_config(tmp_path, scaling=scaling, train={"num_steps": 3000, "keep_checkpoints": 500})
    with running_cluster((0, 1, 1), RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S="15") as cluster:
        driver = cluster.start("ray_job.py", "train", "-c", config)
        wait_for_world_size(tmp_path, driver, 2)
        cluster.kill_node(cluster.nodes[2])
        wait_for_world_size(tmp_path, driver, 1)
        cluster.add_node(1)
        wait_for_world_size(tmp_path, driver, 2)
        driver.send_signal(signal.SIGTERM)
        _, error = driver.communicate(timeout=200)
    assert driver.returncode == 1 and "SIGTERM ended the run at step" in error, error[-3000:]
    sizes = [size for size, _ in itertools.groupby(c.content["world_size"] for c in commits_of(tmp_path))]
    assert sizes == [2, 1, 2]
    assert verify_run(str(tmp_path / "run")) == []


@pytest.mark.ray
@pytest.mark.slow
def test_a_node_that_is_announced_to_go_is_left_without_losing_a_step(tmp_path):
    config = ray_job_config(tmp_path, train={"checkpoint_every_steps": 100_000, "num_steps": 100_000})
    with running_cluster((0, 1, 1)) as cluster:
        driver = cluster.start("ray_job.py", "train", "-c", config)
        wait_until(lambda: bool(read_metrics(str(tmp_path / "run"))), "a step", driver, seconds=200)
        leaving = cluster.nodes[2]
        cluster.announce_preemption(leaving, seconds=60)
        wait_until(lambda: steps_committed(tmp_path) > 0, "a commit before the node goes", driver, seconds=60)
        step = steps_committed(tmp_path)
        cluster.kill_node(leaving)
        cluster.add_node(1)
        wait_until(
            lambda: read_metrics(str(tmp_path / "run"))[-1]["step"] > step, "the run goes on", driver, seconds=200
        )
        driver.send_signal(signal.SIGTERM)
        _, error = driver.communicate(timeout=200)
    assert driver.returncode == 1 and "SIGTERM ended the run at step" in error, error[-3000:]
    assert commits_of(tmp_path)[-1].step > step and verify_run(str(tmp_path / "run")) == []


def commits_of(folder):
    return checkpoints.list_commits(str(folder / "run"))


def wait_for_world_size(folder, driver, size):
    wait_until(
        lambda: bool(commits_of(folder)) and commits_of(folder)[-1].content["world_size"] == size,
        f"a commit of {size} workers",
        driver,
        seconds=200,
    )


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_stopped_worker_is_replaced(tmp_path, num_workers):
    config = ray_job_config(tmp_path, scaling={"num_workers": num_workers, "hang_timeout_seconds": 10.0})
    with running_cluster((2,)) as cluster:
        driver = cluster.start("ray_job.py", "train", "-c", config)
        wait_until(lambda: steps_committed(tmp_path) > 0, "a commit", driver, seconds=200)
        stopped = cluster.train_worker(num_workers - 1)
        stopped.suspend()
        _, error = driver.communicate(timeout=400)
        assert driver.returncode == 0, error[-3000:]
        assert not stopped.is_running()
    check_finished(tmp_path)
