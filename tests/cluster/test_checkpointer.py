"""A checkpoint holds what every rank wrote, whether it was kept in memory or written in place."""

import os

import pytest
import torch
import torch.distributed as dist
from train_support import RECIPE, nothing, options_for, start, train

from cluster import checkpointer, checkpoints
from cluster.checkpointer import Checkpointer
from cluster.verify_run import verify_run
from pipeline import storage


def no_room_in_memory():
    checkpointer.memory_has_room = lambda num_bytes: False


def listing_misses_a_file():
    no_room_in_memory()
    listed = storage.list_files
    storage.list_files = lambda path: [name for name in listed(path) if not name.endswith("shards/1")]


def write(folder, name):
    os.makedirs(os.path.dirname(os.path.join(folder, name)), exist_ok=True)
    with open(os.path.join(folder, name), "w") as file:
        file.write(f"written by rank {dist.get_rank()}")


def write_shards(folder):
    write(folder, f"shards/{dist.get_rank()}")
    if dist.get_rank() == 0:
        write(folder, "weights")


def write_weights(folder):
    write(folder, "weights")


def commit_once(run, save):
    rank_part = Checkpointer(run, "attempt", save, saved_bytes=100, device=torch.device("cpu"), keep_alive=nothing)
    rank_part.start(3, lambda entries: {"step": 3, "files": entries})
    assert rank_part.finish().step == 3


def commit_shards(run, num_threads, should_leave):
    commit_once(run, write_shards)


def commit_weights_of_both(run, num_threads, should_leave):
    commit_once(run, write_weights)


def commit(run, prepare, loop=commit_shards):
    processes = start(run, 2, prepare, loop=loop)
    while not processes.join(grace_period=20.0):
        pass


@pytest.mark.parametrize("prepare", [nothing, no_room_in_memory])
def test_a_commit_lists_what_every_rank_wrote(tmp_path, prepare):
    commit(str(tmp_path), prepare)
    made = checkpoints.latest_commit(str(tmp_path))
    names = ["shards/0", "shards/1", "weights"]
    assert sorted(entry["path"] for entry in made.content["files"]) == names
    found = [os.path.relpath(path, made.path) for path in storage.list_files(made.path)]
    assert found == [checkpoints.COMMIT, *names]
    assert sorted(os.listdir(made.path)) == [checkpoints.COMMIT, "shards", "weights"]


def test_a_listing_that_misses_a_file_commits_nothing(tmp_path):
    with pytest.raises(Exception, match="cannot be written there.*not empty"):
        commit(str(tmp_path), listing_misses_a_file)
    assert checkpoints.list_commits(str(tmp_path)) == []


@pytest.mark.parametrize("zero_stage", [3, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (0, 1, 2))])
def test_an_engine_is_saved_whole_where_memory_has_no_room(tmp_path, zero_stage):
    codes = RECIPE.write(tmp_path / "codes")
    sections = {"deepspeed": {"zero_stage": zero_stage}, "optim": {"weight_average_decay": 0.9}}
    runs = [(tmp_path / "memory", nothing), (tmp_path / "disk", no_room_in_memory)]
    in_memory, on_disk = (train(options_for(folder, codes, **sections), 2, prepare) for folder, prepare in runs)
    names = [sorted(entry["path"] for entry in made.content["files"]) for made in (in_memory, on_disk)]
    assert names[0] == names[1]
    options = options_for(tmp_path / "disk", codes, **sections, train={"num_steps": on_disk.step + 1})
    assert train(options, 2).step == on_disk.step + 1
    assert verify_run(options.run.path) == []


@pytest.mark.parametrize("prepare", [nothing, no_room_in_memory])
def test_a_file_that_two_ranks_wrote_is_not_committed(tmp_path, prepare):
    with pytest.raises(Exception):
        commit(str(tmp_path), prepare, commit_weights_of_both)
    assert checkpoints.list_commits(str(tmp_path)) == []
