"""The training loop in real process groups (gloo), without Ray: exact resume, every ZeRO stage, masked batches, refusals."""

import dataclasses
import multiprocessing
import os
import shutil
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from code_dataset_support import Recipe
from safetensors.torch import load_file
from tests_support import tiny_config

from cluster import checkpoints, run_log
from cluster.train_loop import WEIGHTS, TrainJobOptions, check_resumable, dataset_transformer_config, train_worker
from cluster.verify_run import verify_run
from pipeline.code_dataset import CodeDataset
from stages.config import select_sections
from stages.errors import ArtefactError

RECIPE = Recipe(num_images=22, bad_images=(), grid=(4, 4), codebook_size=32)

# The server imports the slow libraries once; every worker is a fork of it.
multiprocessing.get_context("forkserver").set_forkserver_preload(["deepspeed", "cluster.train_loop", "tests_support"])


def worker(rank, world_size, port, options):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ["WORLD_SIZE"] = str(world_size)
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    train_worker(options, 1)
    dist.destroy_process_group()


def train(options, world_size):
    """Runs the loop in `world_size` processes and returns the run's latest commit."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    torch.multiprocessing.start_processes(
        worker, (world_size, port, options), nprocs=world_size, start_method="forkserver"
    )
    return checkpoints.latest_commit(options.run.path)


def options_for(folder, codes, **sections):
    sections["codes"] = {"path": codes, **sections.get("codes", {})}
    return select_sections(TrainJobOptions, tiny_config(folder, **sections))


@pytest.fixture(scope="module")
def codes(tmp_path_factory):
    return RECIPE.write(tmp_path_factory.mktemp("codes"))


def forget_last_commit(run):
    shutil.rmtree(checkpoints.list_commits(run)[-1].path)


@pytest.mark.parametrize(
    "zero_stage, world_size, precision", [(0, 1, "fp32"), (1, 2, "fp32"), (2, 2, "bf16"), (3, 2, "fp32")]
)
def test_a_run_cut_at_a_commit_goes_on_bitwise(tmp_path, codes, zero_stage, world_size, precision):
    options = options_for(tmp_path, codes, deepspeed={"zero_stage": zero_stage}, train={"precision": precision})
    whole = train(options, world_size)
    weights = load_file(os.path.join(whole.path, WEIGHTS))
    forget_last_commit(options.run.path)
    assert checkpoints.latest_commit(options.run.path).step == 3
    resumed = train(options, world_size)
    assert resumed.step == whole.step == 6
    assert resumed.train_loss == whole.train_loss
    assert resumed.content["sample_log_hash"] == whole.content["sample_log_hash"]
    again = load_file(os.path.join(resumed.path, WEIGHTS))
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    assert verify_run(options.run.path) == []


def test_loss_and_rows_do_not_depend_on_world_size_or_accumulation(tmp_path, codes):
    """22 images in batches of 16: the second batch of each epoch has 6 rows and 10 that do not count."""
    plain = {"model": {"residual_dropout": 0.0, "embedding_dropout": 0.0}}
    one = train(options_for(tmp_path / "one", codes, **plain, train={"micro_batch_size": 16}), 1)
    two = train(options_for(tmp_path / "two", codes, **plain, train={"micro_batch_size": 2}), 2)
    assert one.content["sample_log_hash"] == two.content["sample_log_hash"]
    losses = [
        [record["loss"] for record in run_log.read_log(str(tmp_path / name / "run"), commit.content["log"])]
        for name, commit in (("one", one), ("two", two))
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][0] == pytest.approx(torch.log(torch.tensor(32.0)).item(), rel=1e-5)


def test_old_commits_are_pruned_and_the_log_stays_whole(tmp_path, codes):
    options = options_for(tmp_path, codes, train={"checkpoint_every_steps": 1, "keep_checkpoints": 2})
    commit = train(options, 1)
    assert [c.step for c in checkpoints.list_commits(options.run.path)] == [5, 6]
    assert [r["step"] for r in run_log.read_log(options.run.path, commit.content["log"])] == list(range(6))
    assert verify_run(options.run.path) == []


@pytest.fixture(scope="module")
def finished(tmp_path_factory, codes):
    """A finished run and its options."""
    options = options_for(tmp_path_factory.mktemp("finished"), codes)
    return options, train(options, 1)


def test_a_forged_log_is_found(finished, tmp_path, codes):
    options, commit = finished
    run = str(tmp_path / "run")
    shutil.copytree(options.run.path, run)
    segment = os.path.join(run, commit.content["log"][0]["path"])
    with open(segment) as file:
        text = file.read()
    digest = text.split('"digests": ["')[1][:16]
    with open(segment, "w") as file:
        file.write(text.replace(digest, digest[::-1]))
    assert any("damaged" in problem for problem in verify_run(run))


def test_a_run_on_other_rows_than_prescribed_is_found(finished, monkeypatch):
    options, commit = finished
    monkeypatch.setitem(commit.content["sampler"], "seed", 1)
    monkeypatch.setattr(checkpoints, "list_commits", lambda run: [commit])
    assert len(verify_run(options.run.path)) == 6


@pytest.mark.parametrize(
    "sections, words",
    [
        ({"run": {"seed": 5}}, ["run.seed", "seed 5", "with 0"]),
        ({"train": {"global_batch_size": 8}}, ["train.global_batch_size", "8", "16"]),
        ({"train": {"precision": "bf16"}}, ["train.precision", "bf16", "fp32"]),
        ({"deepspeed": {"zero_stage": 3}}, ["deepspeed.zero_stage", "3", "1"]),
        ({"model": {"hidden_size": 64}}, ["model", "64", "32"]),
    ],
)
def test_a_run_is_not_continued_with_other_options(finished, codes, tmp_path, sections, words):
    done, commit = finished
    options = options_for(tmp_path, codes, **sections)
    dataset = CodeDataset.open(codes, verify=False)
    with pytest.raises(ArtefactError) as caught:
        check_resumable(commit, options, dataset, dataset_transformer_config(options, dataset), 1)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_run_is_not_continued_on_another_dataset_or_world_size(finished, tmp_path):
    options, commit = finished
    other = CodeDataset.open(dataclasses.replace(RECIPE, num_images=23).write(tmp_path / "codes"), verify=False)
    config = dataset_transformer_config(options, other)
    with pytest.raises(ArtefactError, match=f"{other.root_hash}.*{commit.root_hash}"):
        check_resumable(commit, options, other, config, 1)
    same = CodeDataset.open(options.codes.path, verify=False)
    with pytest.raises(ArtefactError, match="scaling.num_workers gives world size 3.*with 1"):
        check_resumable(commit, options, same, config, 3)
