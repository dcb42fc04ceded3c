"""`export-transformer`: a checkpoint out of a run, and back into one."""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from foreign_support import llamagen_tensors, net2net_tensors, tokenizer
from oracles import taming
from safetensors.torch import load_file, save_file
from train_support import RECIPE, options_for, train

import ray_job
from cluster import checkpoints
from cluster.checkpoints import AVERAGES, WEIGHTS
from cluster.export import export, export_transformer
from cluster.import_run import ImportTransformerOptions, import_transformer
from cluster.sampler_actor import SamplerActor, load_transformer
from pipeline import storage
from pipeline.tokenizers import open_tokenizer, store_export, store_tokenizer
from stages.errors import ArtefactError, ConfigError
from stages.options import SamplingOptions

SIDE, CODEBOOK = 4, 48
FILES = {"compvis": "transformer.ckpt", "llamagen": "transformer.pt"}


def tensors_of(format):
    if format == "compvis":
        return {"state_dict": net2net_tensors(SIDE**2, CODEBOOK)}
    return {"model": llamagen_tensors(CODEBOOK, num_classes=3)}


def run_of(folder, file, **given):
    """The summary of an import of a file, with the tokenizer that is in the folder."""
    paths = {"output": str(folder / f"run-of-{os.path.basename(os.path.dirname(file))}"), "tokenizer": str(folder / "tokenizer")}
    return import_transformer(ImportTransformerOptions(file=str(file), **{**paths, **given}))


@pytest.fixture(params=["compvis", "llamagen"])
def published(request, tmp_path):
    """Format, file and imported run of another project's transformer."""
    os.makedirs(tmp_path / "published")
    file = tmp_path / "published" / FILES[request.param]
    torch.save(tensors_of(request.param), file)
    codes_tokenizer = tokenizer(resolution=2 * SIDE, attention_resolutions=(), codebook_size=CODEBOOK)
    store_tokenizer(codes_tokenizer, str(tmp_path / "tokenizer"))
    given = dict(num_classes=0) if request.param == "compvis" else {}
    return request.param, str(file), run_of(tmp_path, str(file), num_heads=2, **given)


def with_averages(checkpoint, folder):
    """A commit of the same step with averaged weights as well, twice as large."""
    commit = checkpoints.open_commit(checkpoint)
    weights = load_file(os.path.join(checkpoint, WEIGHTS))
    os.makedirs(folder)
    save_file(weights, os.path.join(folder, WEIGHTS))
    save_file({name: 2 * tensor for name, tensor in weights.items()}, os.path.join(folder, AVERAGES))
    files = [checkpoints.file_entry(os.path.join(folder, name), name) for name in (WEIGHTS, AVERAGES)]
    return checkpoints.write_commit(folder, {**commit.content, "files": files}).path


def test_a_published_file_is_written_as_it_was(published, tmp_path):
    format, file, summary = published
    exported = export_transformer(summary.checkpoint, str(tmp_path / "out"), format=format, which="average")
    assert exported.weights == str(tmp_path / "out" / FILES[format]) and exported.step == 0
    before, after = (next(iter(torch.load(path, weights_only=True).values())) for path in (file, exported.weights))
    assert before.keys() == after.keys()
    assert [name for name, tensor in before.items() if not torch.equal(tensor, after[name])] == []


def test_a_run_comes_back_bit_by_bit(published, tmp_path):
    format, _, summary = published
    exported = export_transformer(summary.checkpoint, str(tmp_path / "out"), format=format, which="average")
    again = run_of(tmp_path, exported.weights, config=exported.config if format == "compvis" else None)
    first, second = (checkpoints.open_commit(made.checkpoint).content for made in (summary, again))
    assert (second["transformer"], second["files"]) == (first["transformer"], first["files"])


def test_averaged_weights_are_taken_where_there_are_any(published, tmp_path):
    format, _, summary = published
    checkpoint = with_averages(summary.checkpoint, str(tmp_path / "checkpoints" / "step-000000000-aaaa"))
    for which, factor in (("average", 2), ("last", 1)):
        file = export_transformer(checkpoint, str(tmp_path / which), format=format, which=which).weights
        before, after = (next(iter(torch.load(path, weights_only=True).values())) for path in (published[1], file))
        norm = "transformer.ln_f.weight" if format == "compvis" else "norm.weight"
        assert torch.equal(after[norm], factor * before[norm])


def test_an_export_reads_the_weights_alone(published, tmp_path):
    format, _, summary = published
    commit = checkpoints.open_commit(summary.checkpoint)
    shutil.copytree(summary.checkpoint, tmp_path / "copy", ignore=shutil.ignore_patterns(checkpoints.COMMIT))
    optimizer = {"path": "deepspeed/optimizer.pt", "bytes": 1 << 40, "xxh3_128": "0" * 32}  # of a file that is not there
    files = [*commit.content["files"], optimizer]
    checkpoint = checkpoints.write_commit(str(tmp_path / "copy"), {**commit.content, "files": files}).path
    export_transformer(checkpoint, str(tmp_path / "theirs"), format=format, which="last")
    exported = export(checkpoint, str(tmp_path / "ours"), which="last", dtype="fp32")
    assert load_file(exported.weights).keys() == load_file(os.path.join(checkpoint, WEIGHTS)).keys()
    with open(os.path.join(checkpoint, WEIGHTS), "ab") as file:
        file.write(b"0")
    with pytest.raises(ArtefactError, match="damaged"):
        export(checkpoint, str(tmp_path / "damaged"), which="last", dtype="fp32")


def test_an_export_is_repeated_but_overwrites_nothing(published, tmp_path):
    format, _, summary = published
    for _ in range(2):
        exported = export_transformer(summary.checkpoint, str(tmp_path / "out"), format=format, which="last")
    checkpoint = with_averages(summary.checkpoint, str(tmp_path / "checkpoints" / "step-000000000-aaaa"))
    with pytest.raises(ArtefactError, match=f"output holds .*{FILES[format]}, but it is something else than is exported"):
        export_transformer(checkpoint, str(tmp_path / "out"), format=format, which="average")
    assert os.path.exists(exported.config)


def test_a_transformer_of_the_other_kind_is_refused(published, tmp_path):
    format, _, summary = published
    other = "llamagen" if format == "compvis" else "compvis"
    with pytest.raises(ConfigError, match="model.positions is"):
        export_transformer(summary.checkpoint, str(tmp_path / "out"), format=other, which="last")
    assert not os.path.exists(tmp_path / "out")


def test_the_command_says_where_everything_is(published, tmp_path, capsys):
    format, _, summary = published
    output = str(tmp_path / "out")
    assert ray_job.main(["export-transformer", summary.checkpoint, "--format", format, "--output", output, "--json"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["weights"] == os.path.join(output, FILES[format]) and os.path.exists(told["config"]) and told["step"] == 0
    with open(os.path.join(summary.checkpoint, WEIGHTS), "ab") as file:
        file.write(b"0")
    assert ray_job.main(["export-transformer", summary.checkpoint, "--format", format, "--output", output]) == 1


def test_to_a_store_and_back(published, tmp_path, s3):
    format, _, summary = published
    shutil.copytree(summary.run, tmp_path / "copy")
    for path in storage.list_files(str(tmp_path / "copy")):
        storage.put_file_if_absent(storage.join(s3, "run", os.path.relpath(path, tmp_path / "copy")), path)
    checkpoint = storage.join(s3, "run", os.path.relpath(summary.checkpoint, summary.run))
    exported = export_transformer(checkpoint, f"{s3}/out", format=format, which="average")
    assert exported.weights == f"{s3}/out/{FILES[format]}"
    again = run_of(tmp_path, exported.weights, output=f"{s3}/again", config=exported.config if format == "compvis" else None)
    first, second = (checkpoints.open_commit(made.checkpoint).content["files"] for made in (summary, again))
    assert second == first


@torch.no_grad()
def test_the_original_samples_from_the_file_that_the_page_makes(tmp_path, monkeypatch):
    """Net2NetTransformer takes it strictly; its greedy codes and its image are those of the run that was exported."""
    torch.save(tensors_of("compvis"), tmp_path / "last.ckpt")
    codes_tokenizer = tokenizer(resolution=2 * SIDE, attention_resolutions=(), codebook_size=CODEBOOK)
    store_tokenizer(codes_tokenizer, str(tmp_path / "tokenizer"))
    run = run_of(tmp_path, str(tmp_path / "last.ckpt"), num_heads=2, num_classes=0)
    exported = export_transformer(run.checkpoint, str(tmp_path / "exported"), format="compvis", which="average")
    store_export(codes_tokenizer, "compvis", str(tmp_path / "exported"))
    page = (Path(__file__).parents[2] / "docs" / "bring-your-own.md").read_text()
    (snippet,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(snippet, {})

    network = dict(double_z=False, z_channels=16, resolution=2 * SIDE, in_channels=3, out_ch=3, ch=32, ch_mult=[1, 2])
    network |= dict(num_res_blocks=1, attn_resolutions=[], dropout=0.0)
    loss = {"target": "taming.modules.losses.vqperceptual.DummyLoss"}
    sizes = dict(ddconfig=network, lossconfig=loss, n_embed=CODEBOOK, embed_dim=4)
    with open(exported.config) as file:
        params = yaml.safe_load(file)["model"]["params"]
    params["first_stage_config"] = {"target": "taming.models.vqgan.VQModel", "params": sizes}
    model = taming("models.cond_transformer").Net2NetTransformer(**params).eval()
    model.load_state_dict(torch.load("exported/last.ckpt", weights_only=True)["state_dict"], strict=True)
    start = model.encode_to_c(torch.zeros(1, 3, 2 * SIDE, 2 * SIDE))[1]
    theirs = model.sample(start[:, :0], start, steps=SIDE**2, sample=False, top_k=1)
    ours = SamplerActor(run.checkpoint, str(tmp_path / "tokenizer"), SamplingOptions(group_size=1, top_k=1)).codes(0, 1)
    assert np.array_equal(theirs.numpy(), ours)
    image = model.decode_to_img(theirs, (1, 4, SIDE, SIDE))
    expected = open_tokenizer(str(tmp_path / "tokenizer")).decode(torch.from_numpy(ours).view(1, SIDE, SIDE))
    torch.testing.assert_close(image, expected, atol=1e-4, rtol=1e-4)


TRAINED = {
    "llamagen": {"model": dict(qk_norm=False, norm_eps=1e-5, positions="rope-zero-prefix")},
    "compvis": {
        "model": dict(qk_norm=False, norm="layer", norm_eps=1e-5, positions="learned", ffn="gelu", bias=True),
        "conditioning": {"name": "none"},
    },
}


@pytest.mark.parametrize("format", ["compvis", "llamagen"])
@torch.no_grad()
def test_a_model_that_was_trained_here_gives_the_same_logits_when_it_comes_back(tmp_path, format):
    """Trained as the page says, with averaged weights; a start token of its own is added to the first position."""
    sections = {**TRAINED[format], "optim": {"weight_average_decay": 0.9}, "train": {"num_steps": 4}}
    trained = train(options_for(str(tmp_path), RECIPE.write(tmp_path / "codes"), **sections), 1)
    assert trained.has(AVERAGES)
    exported = export_transformer(trained.path, str(tmp_path / "out"), format=format, which="average")
    codes_tokenizer = tokenizer(resolution=2 * SIDE, attention_resolutions=(), codebook_size=RECIPE.codebook_size)
    store_tokenizer(codes_tokenizer, str(tmp_path / "tokenizer"))
    again = run_of(tmp_path, exported.weights, config=exported.config if format == "compvis" else None)
    first, second = load_transformer(trained, "average"), load_transformer(checkpoints.open_commit(again.checkpoint))
    codes, labels = torch.from_numpy(RECIPE.codes[:4, 0].astype(np.int64)), torch.tensor([0, 1, 2, -1])
    torch.testing.assert_close(second(codes, labels), first(codes, labels), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(load_transformer(trained, "last")(codes, labels), first(codes, labels), atol=1e-4)
