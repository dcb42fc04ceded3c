"""`export-transformer`: a checkpoint out of a run, and back into one."""

import json
import os

import pytest
import torch
from foreign_support import llamagen_tensors, net2net_tensors, tokenizer
from safetensors.torch import load_file, save_file

import ray_job
from cluster import checkpoints
from cluster.checkpoints import AVERAGES, WEIGHTS
from cluster.export import export_transformer
from cluster.import_run import ImportTransformerOptions, import_transformer
from pipeline.tokenizers import store_tokenizer
from stages.errors import ArtefactError, ConfigError

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
