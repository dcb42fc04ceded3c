"""What a GPU changes: every command on one, training against the CPU's, exact resume under every way to shard and offload."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tests_support import TINY_TOKENIZER, tiny_config
from train_support import RECIPE, losses, nothing, options_for, train

import ray_job
from cluster import checkpoints
from cluster.checkpoints import WEIGHTS
from cluster.sampler_actor import SamplerActor
from cluster.train_metrics import read_metrics
from pipeline.code_dataset import CodeDataset
from pipeline.encoding import encode_views, prepare_tokenizer
from pipeline.probe import golden_images
from stages.config import build, to_yaml
from stages.first_stage.tokenizer import Tokenizer
from stages.options import CodesOptions, SamplingOptions

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(scope="module")
def codes(tmp_path_factory):
    return RECIPE.write(tmp_path_factory.mktemp("codes"))


def hide_gpu():
    torch.cuda.is_available = lambda: False


@pytest.mark.parametrize(
    "zero_stage, precision, offload",
    [
        (0, "fp32", {}),
        (0, "bf16", {}),
        (1, "bf16", {}),
        (1, "fp32", {}),
        (2, "bf16", {}),
        (3, "bf16", {}),
        (2, "bf16", {"offload_optimizer": True}),
        (3, "bf16", {"offload_optimizer": True, "offload_parameters": True}),
    ],
)
def test_a_run_cut_at_a_commit_goes_on_bitwise(tmp_path, codes, zero_stage, precision, offload):
    sections = {"deepspeed": {"zero_stage": zero_stage, **offload}, "optim": {"weight_average_decay": 0.9}}
    options = options_for(tmp_path, codes, **sections, train={"precision": precision})
    whole = train(options, 1)
    weights = load_file(os.path.join(whole.path, WEIGHTS))
    shutil.rmtree(whole.path)
    resumed = train(options, 1)
    assert resumed.step == whole.step == 6 and resumed.train_loss == whole.train_loss
    again = load_file(os.path.join(resumed.path, WEIGHTS))
    assert all(torch.equal(weights[name], again[name]) for name in weights)


def test_training_gives_the_losses_of_a_cpu(tmp_path, codes):
    no_dropout = {"residual_dropout": 0.0, "embedding_dropout": 0.0}
    runs = {}
    for name, prepare in (("gpu", nothing), ("cpu", hide_gpu)):
        options = options_for(
            tmp_path / name, codes, model={"num_layers": 2, "hidden_size": 64, "num_heads": 2, **no_dropout}
        )
        runs[name] = losses(train(options, 1, prepare))
    np.testing.assert_allclose(runs["gpu"], runs["cpu"], rtol=1e-5)


def test_parts_of_a_step_are_timed_on_the_device(tmp_path, codes):
    options = options_for(tmp_path, codes)
    train(options, 1)
    for line in read_metrics(options.run.path):
        assert line["seconds"] == pytest.approx(sum(line["part_seconds"].values()), rel=0.05)
        assert line["part_seconds"]["forward"] > 0 and line["part_seconds"]["backward"] > 0


@pytest.mark.parametrize("precision, agreement", [("fp32", 0.999), ("bf16", 0.9)])
def test_codes_are_those_of_a_cpu(precision, agreement):
    torch.manual_seed(0)
    tokenizer = Tokenizer(TINY_TOKENIZER).eval().requires_grad_(False)
    views = golden_images(16, 3)
    options = CodesOptions(path="", encode_batch_size=4, encode_precision=precision)
    here = encode_views(prepare_tokenizer(tokenizer, torch.device("cpu")), views, options)
    there = encode_views(prepare_tokenizer(tokenizer, torch.device("cuda")), views, options)
    assert (here == there).mean() >= agreement


@pytest.fixture(scope="module")
def job(ray_cluster, tmp_path_factory):
    """Folder of a finished whole job."""
    folder = tmp_path_factory.mktemp("job")
    sections = {"scaling": {"use_gpu": True, "cpus_per_worker": 0.5}, "train": {"precision": "bf16"}}
    (folder / "config.yaml").write_text(to_yaml(tiny_config(str(folder), **sections)))
    for command in ("train-tokenizer", "tokenize", "train", "sample", "evaluate"):
        assert ray_job.main([command, "-c", str(folder / "config.yaml")]) == 0, command
    return folder


@pytest.mark.ray
class TestWholeJob:
    def test_every_artefact_verifies(self, job):
        (record,) = Path(job, "evaluation", "records").glob("*.json")
        for path in (job / "tokenizer", job / "codes", job / "run", record):
            assert ray_job.main(["verify", str(path)]) == 0, path

    def test_the_gpu_made_the_codes(self, job):
        receipts = [json.loads(path.read_text()) for path in Path(job, "codes").rglob("*.json")]
        assert "NVIDIA" in json.dumps(receipts)
        assert CodeDataset.open(str(job / "codes"), verify=True).num_rows == 120

    def test_samples_do_not_depend_on_the_bounds(self, job):
        commit = checkpoints.latest_commit(str(job / "run"))
        sampling = build(SamplingOptions, {"path": "", "group_size": 4, "top_k": 16})
        actor = SamplerActor(commit.path, str(job / "tokenizer"), sampling)
        assert actor.device.type == "cuda"
        whole = actor.images(0, 8)
        assert np.array_equal(whole, np.concatenate([actor.images(0, 3), actor.images(3, 8)]))
        assert np.array_equal(whole[:6], np.load(job / "samples" / "samples.npz")["images"])
