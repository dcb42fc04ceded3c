"""Transformers in the files of other projects: their own code loads them and gives the same logits, and importing gives them back."""

import dataclasses
import math
import os

import pytest
import torch
import yaml
from foreign_support import tokenizer
from llamagen_support import LlamaGenGpt, randomise
from oracles import taming

from stages.compvis_project import read_project
from stages.errors import ConfigError
from stages.first_stage.foreign import read_foreign
from stages.options import ConditioningOptions, ModelOptions
from stages.second_stage.export_transformer import FILES, export_transformer
from stages.second_stage.import_transformer import take_transformer
from stages.second_stage.transformer import Transformer, transformer_config

SIDE, CODEBOOK, CLASSES = 4, 48, 7
NUM_CODES = SIDE * SIDE
COMPVIS = dict(positions="learned", qk_norm=False, norm="layer", norm_eps=1e-5, ffn="gelu", bias=True)
LLAMAGEN = dict(positions="rope-zero-prefix", qk_norm=False, norm_eps=1e-5)


def transformer(options, name="class", num_classes=CLASSES, **conditioning):
    """One with random weights everywhere."""
    model = ModelOptions(**{**dict(num_layers=3, hidden_size=32, num_heads=2), **options})
    given = ConditioningOptions(name=name, **conditioning)
    config = transformer_config(model, given, codebook_size=CODEBOOK, grid=(SIDE, SIDE), num_classes=num_classes)
    return randomise(Transformer(config)).requires_grad_(False)


def among_the_codes(model, start=0):
    """The same with conditions that are vectors of codes, as the original has them, and their mean for none."""
    codes, rows = model.code_embedding.weight, model.conditioning.embedding.weight
    if model.config.conditioning == "none":
        rows.copy_(codes[start : start + 1])
    else:
        rows.copy_(torch.cat([codes[: len(rows) - 1], codes[: len(rows) - 1].mean(0, keepdim=True)]))
    return model


def compvis_cases():
    """Models, condition tokens of three rows for the original, and labels that mean the same here."""
    generator = torch.Generator().manual_seed(1)
    classes, maps = torch.tensor([0, 6, 3]), torch.randint(0, 40, (3, NUM_CODES), generator=generator)
    start = torch.full((3, 1), 5)
    conditions = dict(name="codes", num_classes=40, num_tokens=NUM_CODES)
    return {
        "none": (among_the_codes(transformer(COMPVIS, "none", 0), start=5), start, torch.full((3,), -1)),
        "class": (among_the_codes(transformer(COMPVIS)), classes[:, None], classes),
        "codes": (among_the_codes(transformer(COMPVIS, **conditions)), maps, maps),
    }


def random_codes():
    return torch.randint(0, CODEBOOK, (3, NUM_CODES), generator=torch.Generator().manual_seed(2))


def exported(model, format, folder):
    """Paths of the tensors and of the parameters."""
    assert export_transformer(model.config, model.state_dict(), format, str(folder)) == FILES[format]
    return [str(folder / name) for name in FILES[format]]


def their_logits(file, parameters, tokens, codes):
    """Of the original's own class, made as its project file says and loaded strictly."""
    with open(parameters) as stream:
        params = yaml.safe_load(stream)["model"]["params"]["transformer_config"]["params"]
    gpt = taming("modules.transformer.mingpt").GPT(**params).eval()
    state = torch.load(file, weights_only=True)["state_dict"]
    gpt.load_state_dict({name.removeprefix("transformer."): tensor for name, tensor in state.items()}, strict=True)
    return gpt(torch.cat([tokens, codes], 1)[:, :-1])[0][:, tokens.shape[1] - 1 :]


def imported(file, project=None, **given):
    codes_tokenizer = tokenizer(resolution=2 * SIDE, attention_resolutions=(), codebook_size=CODEBOOK)
    return take_transformer(read_foreign(file), codes_tokenizer, project=project and read_project(project), **given)


def assert_same(found, model):
    """Every tensor bit by bit, and the module they are for but dropout, which weights do not depend on."""
    without = dict(residual_dropout=0.0, embedding_dropout=0.0)
    assert dataclasses.replace(found.config, **without) == dataclasses.replace(model.config, **without)
    state = model.state_dict()
    assert found.weights.keys() == state.keys()
    assert [name for name, tensor in state.items() if not torch.equal(tensor, found.weights[name])] == []


@pytest.mark.parametrize("name", ["none", "class", "codes"])
@torch.no_grad()
def test_compvis_loads_the_file_strictly_and_it_comes_back_bit_by_bit(name, tmp_path):
    model, tokens, labels = compvis_cases()[name]
    codes = random_codes()
    file, project = exported(model, "compvis", tmp_path)
    torch.testing.assert_close(their_logits(file, project, tokens, codes), model(codes, labels), atol=1e-5, rtol=1e-5)
    assert_same(imported(file, project), model)
    assert imported(file, project).model.residual_dropout == 0.1


@torch.no_grad()
def test_a_start_token_of_its_own_moves_to_the_first_position(tmp_path, caplog):
    model, codes, labels = transformer(COMPVIS, "none", 0), random_codes(), torch.full((3,), -1)
    file, project = exported(model, "compvis", tmp_path)
    assert "The start token is no vector of a code" in caplog.text
    expected = model(codes, labels)
    zeros = torch.zeros(3, 1, dtype=torch.int64)
    torch.testing.assert_close(their_logits(file, project, zeros, codes), expected, atol=1e-5, rtol=1e-5)
    found = imported(file, project)
    again = Transformer(found.config).eval()
    again.load_state_dict(found.weights)
    torch.testing.assert_close(again(codes, labels), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_llamagen_loads_the_file_strictly_and_it_comes_back_bit_by_bit(tmp_path):
    """Its classes have an embedding of their own, so that any such model can be said in it."""
    model, codes, labels = transformer(LLAMAGEN), random_codes(), torch.tensor([0, 6, -1])
    file, arguments = exported(model, "llamagen", tmp_path)
    with open(arguments) as stream:
        given = yaml.safe_load(stream)
    named = {"vocabulary": "vocab_size", "classes": "num_classes", "width": "dim", "layers": "n_layer", "heads": "n_head"}
    gpt = LlamaGenGpt(ffn=llamagen_ffn(given), **{ours: given[theirs] for ours, theirs in named.items()}).eval()
    gpt.load_state_dict(torch.load(file, weights_only=True)["model"], strict=True)
    theirs = gpt(codes, torch.tensor([0, 6, CLASSES]), math.isqrt(given["block_size"]))
    torch.testing.assert_close(theirs, model(codes, labels), atol=1e-5, rtol=1e-5)
    assert_same(imported(file), model)


def llamagen_ffn(given):
    """The width inside the feed-forward layer that LlamaGen's code gives a model of these arguments."""
    width = int(2 * 4 * given["dim"] / 3)
    width = int(given.get("ffn_dim_multiplier", 1) * width)
    return -(-width // given["multiple_of"]) * given["multiple_of"]


@pytest.mark.parametrize(
    "hidden_size,ffn_size,multiple",
    [(768, 2048, 256), (1024, 2816, 256), (3200, 8704, 256), (1024, None, 64), (64, 170, 2), (64, 77, 1), (64, 999, 1)],
)
def test_the_width_of_the_feed_forward_layer_is_said_as_llamagen_computes_it(hidden_size, ffn_size, multiple, tmp_path):
    sizes = dict(num_layers=1, hidden_size=hidden_size, num_heads=2, ffn_size=ffn_size)
    model = transformer({**LLAMAGEN, **sizes})
    _, arguments = exported(model, "llamagen", tmp_path)
    with open(arguments) as stream:
        given = yaml.safe_load(stream)
    assert llamagen_ffn(given) == model.config.ffn_size and given["multiple_of"] == multiple


def test_heads_of_an_exported_file_cannot_be_renamed(tmp_path):
    file, _ = exported(transformer(LLAMAGEN), "llamagen", tmp_path)
    with pytest.raises(ConfigError, match="--num-heads is 4, but .*transformer.pt was exported with 2"):
        imported(file, num_heads=4)


@pytest.mark.parametrize(
    "format,changes,message",
    [
        ("compvis", dict(positions="rope"), "model.positions is rope, but CompVis' GPT has learned only. Train with model.pos"),
        ("compvis", dict(norm="rms"), "model.norm is rms, but CompVis' GPT has layer only"),
        ("compvis", dict(norm_eps=1e-6), "model.norm_eps is 1e-06, but CompVis' GPT has 1e-05 only"),
        ("compvis", dict(ffn="swiglu"), "model.ffn is swiglu, but CompVis' GPT has gelu only"),
        ("compvis", dict(ffn_size=64), "model.ffn_size is 64, but CompVis' GPT has 128 only"),
        ("compvis", dict(bias=False), "model.bias is False, but CompVis' GPT has True only"),
        ("compvis", dict(qk_norm=True), "model.qk_norm is True, but CompVis' GPT has False only"),
        ("llamagen", dict(positions="rope"), "model.positions is rope, but LlamaGen's GPT has rope-zero-prefix only"),
        ("llamagen", dict(positions="learned"), "model.positions is learned, but LlamaGen's GPT has rope-zero-prefix only"),
        ("llamagen", dict(norm="layer"), "model.norm is layer, but LlamaGen's GPT has rms only"),
        ("llamagen", dict(norm_eps=1e-6), "model.norm_eps is 1e-06, but LlamaGen's GPT has 1e-05 only"),
        ("llamagen", dict(ffn="gelu"), "model.ffn is gelu, but LlamaGen's GPT has swiglu only"),
        ("llamagen", dict(bias=True), "model.bias is True, but LlamaGen's GPT has False only"),
        ("llamagen", dict(qk_norm=True), "model.qk_norm is True, but LlamaGen's GPT has False only"),
        ("llamagen", dict(rope_base=5000.0), "model.rope_base is 5000.0, but LlamaGen's GPT has 10000.0 only"),
    ],
)
def test_what_the_other_project_cannot_build_is_refused_by_its_option(format, changes, message, tmp_path):
    usual = COMPVIS if format == "compvis" else LLAMAGEN
    model = among_the_codes(transformer({**usual, **changes}))
    with pytest.raises(ConfigError, match=f"{message}.* or use the command export"):
        exported(model, format, tmp_path)
    assert os.listdir(tmp_path) == []


def test_conditions_that_the_other_project_cannot_say_are_refused(tmp_path):
    moved = among_the_codes(transformer(COMPVIS))
    moved.conditioning.embedding.weight[2:4] += 1
    cases = [
        ("compvis", moved, "conditioning.name is class with 2 of 7 vectors that are no longer those of codes"),
        ("compvis", transformer(COMPVIS, num_classes=50), "conditioning.name is class with 50 values, but .* its 48 codes"),
        ("llamagen", transformer(LLAMAGEN, "none", 0), "conditioning.name is none, but LlamaGen's GPT is conditioned on classes"),
        (
            "llamagen",
            transformer(LLAMAGEN, "codes", 40, num_tokens=NUM_CODES),
            "conditioning.name is codes, but LlamaGen's GPT is conditioned on classes",
        ),
    ]
    for format, model, message in cases:
        with pytest.raises(ConfigError, match=f"{message}.* Use the command export"):
            exported(model, format, tmp_path)
    own = among_the_codes(transformer(COMPVIS))
    own.config = dataclasses.replace(own.config, conditioning="mine:Own")
    with pytest.raises(ConfigError, match="conditioning.name is mine:Own, but CompVis' GPT has none, class and codes"):
        exported(own, "compvis", tmp_path)
    wide = transformer(LLAMAGEN)
    wide.config = dataclasses.replace(wide.config, grid=(2, 8))
    with pytest.raises(ConfigError, match="The grid of codes is 2 x 8, but LlamaGen's GPT has square ones"):
        exported(wide, "llamagen", tmp_path)
