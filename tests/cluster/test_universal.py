"""Engines of every kind: what is read of them whole, how a checkpoint moves between them, and that damage on the way is found."""

import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from train_support import RECIPE, losses, options_for, train

from cluster import checkpoints
from cluster.checkpoints import AVERAGES, WEIGHTS
from cluster.export import export
from cluster.verify_run import verify_run
from stages.errors import ArtefactError


@pytest.fixture(scope="module")
def codes(tmp_path_factory):
    return RECIPE.write(tmp_path_factory.mktemp("codes"))


PLAIN = {"model": {"residual_dropout": 0.0, "embedding_dropout": 0.0}, "optim": {"weight_average_decay": 0.9}}


@pytest.fixture(scope="module")
def reference(tmp_path_factory, codes):
    """A run on one rank without ZeRO."""
    options = options_for(tmp_path_factory.mktemp("reference"), codes, **PLAIN, deepspeed={"zero_stage": 0})
    return train(options, 1)


@pytest.mark.parametrize(
    "sections, world_size",
    [
        ({"deepspeed": {"zero_stage": 1, "offload_optimizer": True}}, 2),
        ({"deepspeed": {"zero_stage": 3, "offload_optimizer": True, "offload_parameters": True}}, 2),
        ({"deepspeed": {"zero_stage": 2}, "train": {"activation_checkpointing": True}}, 1),
        ({"deepspeed": {"zero_stage": 1}, "scaling": {"num_workers": [1, 3]}}, 3),
    ],
)
def test_every_engine_trains_the_same(tmp_path, codes, reference, sections, world_size):
    """Three ranks do not divide 16 rows: slices are uneven, and padding does not count."""
    commit = train(options_for(tmp_path, codes, **PLAIN, **sections), world_size)
    assert commit.content["sample_log_hash"] == reference.content["sample_log_hash"]
    assert losses(commit) == pytest.approx(losses(reference), rel=1e-5)
    for name in (WEIGHTS, AVERAGES):
        ours, theirs = (load_file(os.path.join(c.path, name)) for c in (commit, reference))
        assert ours.keys() == theirs.keys()
        for key in theirs:
            torch.testing.assert_close(ours[key], theirs[key], rtol=1e-3, atol=1e-4)


def test_unsharded_bf16_trains_like_sharded(tmp_path, codes):
    """DeepSpeed lets the unsharded optimizer make a step before the first."""
    found = []
    for stage in (0, 1):
        sections = {**PLAIN, "deepspeed": {"zero_stage": stage}, "train": {"precision": "bf16"}}
        found.append(losses(train(options_for(tmp_path / str(stage), codes, **sections), 1)))
    assert found[0] == pytest.approx(found[1], rel=2e-3)


def test_a_conversion_that_changes_a_weight_is_refused(tmp_path, codes):
    options = options_for(tmp_path, codes, scaling={"num_workers": [1, 2]})
    commit = train(options, 2)
    weights = load_file(os.path.join(commit.path, WEIGHTS))
    name = sorted(weights)[3]
    weights[name].view(-1)[0] += 1
    save_file(weights, os.path.join(commit.path, WEIGHTS))
    more = options_for(tmp_path, codes, scaling={"num_workers": [1, 2]}, train={"num_steps": 9})
    with pytest.raises(Exception, match=f"another {name} than"):
        train(more, 1, trust_files)


def trust_files():
    checkpoints.commit_problems = lambda commit, names=None: []


def test_a_checkpoint_that_cannot_be_converted_is_refused(tmp_path, codes):
    options = options_for(tmp_path, codes, scaling={"num_workers": [1, 2]})
    commit = train(options, 2)
    for entry in commit.content["files"]:
        if "optim_states" in entry["path"]:
            with open(os.path.join(commit.path, entry["path"]), "r+b") as file:
                file.truncate(100)
    more = options_for(tmp_path, codes, scaling={"num_workers": [1, 2]}, train={"num_steps": 9})
    with pytest.raises(Exception, match="DeepSpeed cannot convert it"):
        train(more, 1, trust_files)
    older = train(more, 1)
    assert older.step == 9, "the damaged one is passed over where files are hashed"
    assert verify_run(options.run.path) == [], "and is no checkpoint any more"


def test_weights_are_exported(tmp_path, reference):
    summary = export(reference.path, str(tmp_path / "out"), which="average", dtype="bf16")
    exported, averages = load_file(summary.weights), load_file(os.path.join(reference.path, AVERAGES))
    assert summary.step == 6
    assert all(torch.equal(exported[name], averages[name].bfloat16()) for name in averages)
    export(reference.path, str(tmp_path / "out"), which="average", dtype="bf16")
    with pytest.raises(ArtefactError, match="something else"):
        export(reference.path, str(tmp_path / "out"), which="last", dtype="bf16")
