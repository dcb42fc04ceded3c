"""The training loop in real process groups (gloo), without Ray: exact resume, every ZeRO stage, masked batches, refusals."""

import dataclasses
import functools
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file
from train_support import RECIPE, log_of, losses, options_for, train

from cluster import checkpoints, run_log
from cluster.checkpoints import AVERAGES, SHARDS, WEIGHTS
from cluster.resume import check_resumable, read_on
from cluster.train_options import dataset_transformer_config
from cluster.verify_run import verify_run
from pipeline import storage
from pipeline.code_dataset import CodeDataset
from stages.errors import ArtefactError


@pytest.fixture(scope="module")
def codes(tmp_path_factory):
    return RECIPE.write(tmp_path_factory.mktemp("codes"))


def forget_last_commit(run):
    shutil.rmtree(checkpoints.list_commits(run)[-1].path)


@pytest.mark.parametrize(
    "zero_stage, world_size, precision",
    [(0, 1, "fp32"), (0, 2, "bf16"), (1, 2, "fp32"), (2, 2, "bf16"), (3, 2, "fp32")],
)
def test_a_run_cut_at_a_commit_goes_on_bitwise(tmp_path, codes, zero_stage, world_size, precision):
    sections = {"deepspeed": {"zero_stage": zero_stage}, "optim": {"weight_average_decay": 0.9}}
    options = options_for(tmp_path, codes, **sections, train={"precision": precision})
    whole = train(options, world_size)
    log, weights = log_of(whole), load_file(os.path.join(whole.path, WEIGHTS))
    forget_last_commit(options.run.path)
    assert checkpoints.latest_commit(options.run.path).step == 3
    resumed = train(options, world_size)
    assert resumed.step == whole.step == 6
    assert log_of(resumed) == log
    assert resumed.content["sample_log_hash"] == whole.content["sample_log_hash"]
    again = load_file(os.path.join(resumed.path, WEIGHTS))
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    assert verify_run(options.run.path) == []


@pytest.mark.parametrize("next_stage", [1, 2])
def test_weight_decay_may_change_at_a_resume(tmp_path, codes, next_stage):
    """As it is where the checkpoint must be converted first."""

    def options_at(folder, weight_decay, zero_stage):
        optim = {"weight_decay": weight_decay, "learning_rate": 1e-2}
        return options_for(folder, codes, optim=optim, deepspeed={"zero_stage": zero_stage})

    begun = options_at(tmp_path / "begun", 0.0, 1)
    train(begun, 1)
    forget_last_commit(begun.run.path)
    found = {}
    for weight_decay in (0.0, 5.0):
        options = options_at(tmp_path / f"decay {weight_decay}", weight_decay, next_stage)
        shutil.copytree(begun.run.path, options.run.path)
        commit = train(options, 1)
        found[weight_decay] = load_file(os.path.join(commit.path, WEIGHTS))["blocks.0.ffn.down.weight"].norm()
    assert found[5.0] < 0.95 * found[0.0]


def note_downloads(environment, path):
    """Makes this process know the S3 server, and write down which files it downloads."""
    os.environ |= environment
    download = storage.download

    def noted(source, target):
        with open(path, "a") as file:
            file.write(f"{os.path.basename(target)}\n")
        download(source, target)

    storage.download = noted


def test_a_resume_from_s3_fetches_each_file_once_per_node_and_no_other(tmp_path, codes, s3, s3_server):
    sections = {"run": {"path": f"{s3}/run"}, "deepspeed": {"zero_stage": 1}}
    prepare = functools.partial(note_downloads, s3_server, str(tmp_path / "downloads"))
    whole = train(options_for(tmp_path, codes, deepspeed={"zero_stage": 1}), 2)
    train(options_for(tmp_path, codes, **sections, train={"num_steps": 3}), 2, prepare)
    resumed = train(options_for(tmp_path, codes, **sections), 2, prepare)
    assert losses(resumed) == losses(whole)
    shards = [f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(2)]
    assert sorted((tmp_path / "downloads").read_text().split()) == ["mp_rank_00_model_states.pt", *shards]


@pytest.mark.slow
def test_a_run_on_s3_goes_on_at_another_world_size(tmp_path, codes, s3, s3_server):
    prepare = functools.partial(note_downloads, s3_server, str(tmp_path / "downloads"))
    sections = {"run": {"path": f"{s3}/run"}, "optim": {"weight_average_decay": 0.9}}
    train(options_for(tmp_path, codes, **sections, train={"num_steps": 3}), 1, prepare)
    resumed = train(options_for(tmp_path, codes, **sections), 2, prepare)
    whole = train(options_for(tmp_path, codes, optim={"weight_average_decay": 0.9}), 1)
    assert losses(resumed) == pytest.approx(losses(whole), rel=1e-3)
    downloads = (tmp_path / "downloads").read_text().split()
    assert AVERAGES in downloads and len(downloads) == len(set(downloads))


@pytest.mark.parametrize("ranks", [[0], [2, 3], [10]])
@pytest.mark.parametrize("zero_stage", [1, 3])
def test_a_node_reads_the_shards_of_its_ranks(zero_stage, ranks):
    kinds = ["optim", "model"] if zero_stage == 3 else ["optim"]
    shards = {r: [f"{SHARDS}/bf16_zero_pp_rank_{r}_mp_rank_00_{kind}_states.pt" for kind in kinds] for r in range(12)}
    common = [] if zero_stage == 3 else [f"{SHARDS}/mp_rank_00_model_states.pt"]
    names = [*common, *(name for found in shards.values() for name in found), WEIGHTS, AVERAGES]
    commit = checkpoints.Commit("run/checkpoints/step", {"files": [{"path": name} for name in names]}, "")
    assert read_on(commit, ranks) == [*common, *(name for rank in ranks for name in shards[rank])]


QUICK_CHANGES = [((3, 2), (1, 1), "fp32")]
SLOW_CHANGES = [
    ((2, 2), (3, 3), "bf16"),
    ((0, 1), (2, 2), "fp32"),
    ((1, 2), (3, 1), "fp32"),
    ((3, 1), (0, 2), "fp32"),
    ((0, 2), (1, 1), "bf16"),
    ((1, 3), (1, 2), "bf16"),
]


@pytest.mark.parametrize(
    "before, after, precision",
    QUICK_CHANGES + [pytest.param(*change, marks=pytest.mark.slow) for change in SLOW_CHANGES],
)
def test_a_run_goes_on_at_another_zero_stage_and_world_size(tmp_path, codes, before, after, precision):
    """Rows are the same, and losses those of a run that never changed but for the order of sums."""

    def options_at(folder, stage, num_workers):
        return options_for(
            folder,
            codes,
            model={"residual_dropout": 0.0, "embedding_dropout": 0.0, "hidden_size": 24, "num_heads": 2},
            optim={"weight_average_decay": 0.9},
            deepspeed={"zero_stage": stage},
            scaling={"num_workers": [1, 3]},
            train={"precision": precision},
        )

    (stage, num_workers), (next_stage, next_num_workers) = before, after
    whole = train(options_at(tmp_path / "whole", stage, num_workers), num_workers)
    changed = options_at(tmp_path / "changed", stage, num_workers)
    train(changed, num_workers)
    forget_last_commit(changed.run.path)
    changed = options_at(tmp_path / "changed", next_stage, next_num_workers)
    commit = train(changed, next_num_workers)
    assert (commit.step, commit.content["zero_stage"], commit.content["world_size"]) == (
        6,
        next_stage,
        next_num_workers,
    )
    assert commit.content["sample_log_hash"] == whole.content["sample_log_hash"]
    assert verify_run(changed.run.path) == []
    tolerance = 1e-4 if precision == "fp32" else 5e-3
    assert losses(commit) == pytest.approx(losses(whole), rel=tolerance)
    for name in (WEIGHTS, AVERAGES):
        ours, theirs = (load_file(os.path.join(c.path, name)) for c in (commit, whole))
        for key in theirs:
            torch.testing.assert_close(
                ours[key].float(), theirs[key].float(), rtol=1e-2, atol=10 * tolerance * 1e-3 + 1e-3
            )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_without_sharding_every_step_has_its_own_norm(tmp_path, codes, precision):
    norms = []
    for zero_stage in (0, 1):
        sections = {"deepspeed": {"zero_stage": zero_stage}, "train": {"precision": precision}, "optim": {"learning_rate": 0.05}}
        norms.append([record["grad_norm"] for record in log_of(train(options_for(tmp_path / str(zero_stage), codes, **sections), 1))])
    assert norms[0] == pytest.approx(norms[1], rel=0.02)
    assert max(norms[0]) > 1.1 * min(norms[0])


def test_loss_and_rows_do_not_depend_on_world_size_or_accumulation(tmp_path, codes):
    """22 images in batches of 16: the second batch of each epoch has 6 rows and 10 that do not count."""
    plain = {"model": {"residual_dropout": 0.0, "embedding_dropout": 0.0}}
    one = train(options_for(tmp_path / "one", codes, **plain, train={"micro_batch_size": 16}), 1)
    two = train(options_for(tmp_path / "two", codes, **plain, train={"micro_batch_size": 2}), 2)
    assert one.content["sample_log_hash"] == two.content["sample_log_hash"]
    assert losses(one) == pytest.approx(losses(two), rel=1e-4)
    assert losses(one)[0] == pytest.approx(torch.log(torch.tensor(32.0)).item(), rel=1e-5)


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


def test_a_checkpoint_that_is_pruned_meanwhile_is_no_problem(finished, tmp_path, monkeypatch):
    run = str(tmp_path / "run")
    shutil.copytree(finished[0].run.path, run)
    first, *_ = checkpoints.list_commits(run)
    real = checkpoints.commit_problems

    def prune_first(commit):
        shutil.rmtree(first.path, ignore_errors=True)
        return real(commit)

    monkeypatch.setattr(checkpoints, "commit_problems", prune_first)
    assert verify_run(run) == []


def test_a_run_on_other_rows_than_prescribed_is_found(finished, monkeypatch):
    options, commit = finished
    monkeypatch.setitem(commit.content["sampler"], "seed", 1)
    monkeypatch.setattr(checkpoints, "list_commits", lambda run, problems: [commit])
    assert len(verify_run(options.run.path)) == 6


@pytest.mark.parametrize(
    "sections, words",
    [
        ({"run": {"seed": 5}}, ["run.seed", "seed 5", "with 0"]),
        ({"train": {"global_batch_size": 8}}, ["train.global_batch_size", "8", "16"]),
        ({"train": {"precision": "bf16"}}, ["train.precision", "bf16", "fp32"]),
        ({"optim": {"weight_average_decay": 0.9}}, ["optim.weight_average_decay", "True", "False"]),
        ({"model": {"hidden_size": 64}}, ["model", "64", "32"]),
    ],
)
def test_a_run_is_not_continued_with_other_options(finished, codes, tmp_path, sections, words):
    done, commit = finished
    options = options_for(tmp_path, codes, **sections)
    dataset = CodeDataset.open(codes, verify=False)
    with pytest.raises(ArtefactError) as caught:
        check_resumable(commit, options, dataset, None, dataset_transformer_config(options, dataset, None))
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_run_is_not_continued_on_another_dataset(finished, tmp_path):
    options, commit = finished
    other = CodeDataset.open(dataclasses.replace(RECIPE, num_images=23).write(tmp_path / "codes"), verify=False)
    config = dataset_transformer_config(options, other, None)
    with pytest.raises(ArtefactError, match=f"{other.root_hash}.*{commit.root_hash}"):
        check_resumable(commit, options, other, None, config)
