"""The second stage against the original code with the same weights: CompVis' GPT from PyPI, and LlamaGen's."""

import dataclasses

import numpy as np
import pytest
import torch
from foreign_support import tokenizer
from llamagen_support import LlamaGenGpt, randomise
from oracles import taming

from stages.compvis_project import Project, Target
from stages.errors import TesseraError
from stages.first_stage.foreign import Foreign
from stages.options import SamplingOptions
from stages.second_stage.import_transformer import take_transformer
from stages.second_stage.sampling import draw, sample_group, uniforms
from stages.second_stage.transformer import KVCache, Transformer

SIDE, WIDTH, HEADS, LAYERS, CLASSES = 4, 32, 2, 3, 7
NUM_CODES = SIDE * SIDE
LABELATOR = {"target": "taming.modules.util.Labelator", "params": {"n_classes": CLASSES}}
SEGMENTATION = {"target": "taming.models.vqgan.VQSegmentationModel", "params": {"n_labels": 5}}


def codes_tokenizer():
    return tokenizer(resolution=2 * SIDE, attention_resolutions=(), codebook_size=48)


def compvis_gpt(block_size, vocabulary=48):
    mingpt = taming("modules.transformer.mingpt")
    return randomise(mingpt.GPT(vocabulary, block_size, n_layer=LAYERS, n_head=HEADS, n_embd=WIDTH))


def project(cond_stage, **params):
    gpt = {"target": "taming.modules.transformer.mingpt.GPT", "params": {"n_head": HEADS, **params}}
    return Project("p.yaml", Target("Net2NetTransformer", {"transformer_config": gpt, "cond_stage_config": cond_stage}))


def imported(module, cond_stage="__is_unconditional__", **params):
    tensors = {f"transformer.{name}": tensor for name, tensor in module.state_dict().items()}
    return take_transformer(Foreign("last.ckpt", tensors, {}), codes_tokenizer(), project=project(cond_stage, **params))


def build(found):
    model = Transformer(found.config)
    model.load_state_dict(found.weights)
    return model.eval().requires_grad_(False)


def cases():
    """Name, conditioning stage, condition tokens of three rows, and labels that mean the same here."""
    generator = torch.Generator().manual_seed(1)
    classes = torch.tensor([0, 6, 3])
    maps = torch.randint(0, 48, (3, NUM_CODES), generator=generator)
    return {
        "unconditional": ("__is_unconditional__", torch.zeros(3, 1, dtype=torch.int64), torch.full((3,), -1)),
        "class": (LABELATOR, classes[:, None], classes),
        "segmentation": (SEGMENTATION, maps, maps),
    }


CASES = ["unconditional", "class", "segmentation"]


def random_codes(rows=3):
    return torch.randint(0, 48, (rows, NUM_CODES), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_logits_are_those_of_the_original(name):
    stage, tokens, labels = cases()[name]
    gpt = compvis_gpt(tokens.shape[1] + NUM_CODES)
    model, codes = build(imported(gpt, stage)), random_codes()
    expected, _ = gpt(torch.cat([tokens, codes], 1)[:, :-1])
    torch.testing.assert_close(model(codes, labels), expected[:, tokens.shape[1] - 1 :], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_cached_distributions_are_those_of_the_original(name):
    """Step by step on the same codes: the original with its cache, then temperature, top-k and top-p, as it filters them."""
    mingpt = taming("modules.transformer.mingpt")
    stage, tokens, labels = cases()[name]
    gpt, codes = compvis_gpt(tokens.shape[1] + NUM_CODES), random_codes()
    found = imported(gpt, stage)
    model, cache = build(found), KVCache(found.config, 3, found.config.num_positions, torch.float32, "cpu")
    options = SamplingOptions(temperature=0.7, top_k=10, top_p=0.9)
    past, fed = [], tokens
    for n in range(NUM_CODES):
        theirs, _, present = gpt.forward_with_past(fed, past=past or None, past_length=n + tokens.shape[1] - 1)
        past.append(present)
        ours = model.prefill(labels, cache) if n == 0 else model.step(codes[:, n - 1], cache)
        torch.testing.assert_close(ours, theirs[:, -1], atol=1e-5, rtol=1e-5)
        filtered = mingpt.top_k_top_p_filtering(theirs[:, -1] / 0.7, top_k=10, top_p=0.9)
        cumulative = filtered.double().softmax(-1).cumsum(-1)
        u = torch.from_numpy(uniforms(0, np.arange(3), n))
        assert torch.equal(draw(ours, u, options), torch.searchsorted(cumulative, u[:, None], right=True)[:, 0])
        fed = codes[:, n : n + 1]


@torch.no_grad()
def test_greedy_samples_are_those_of_the_original():
    mingpt = taming("modules.transformer.mingpt")
    gpt = compvis_gpt(1 + NUM_CODES)
    model = build(imported(gpt, LABELATOR))
    theirs = mingpt.sample_with_past(
        torch.arange(CLASSES)[:, None], gpt, NUM_CODES, sample_logits=False, top_k=1, top_p=1.0
    )
    ours = sample_group(model, SamplingOptions(top_k=1, group_size=CLASSES), 0)
    assert np.array_equal(ours, theirs.numpy())


def llamagen(**changes):
    sizes = dict(vocabulary=48, classes=CLASSES, width=WIDTH, ffn=64, layers=LAYERS, heads=HEADS)
    return randomise(LlamaGenGpt(**{**sizes, **changes}))


def imported_llamagen(module, **tensors):
    content = {**module.state_dict(), **tensors}
    return take_transformer(Foreign("c2i.pt", content, {}), codes_tokenizer(), num_heads=HEADS)


@torch.no_grad()
def test_logits_are_those_of_llamagen():
    gpt, codes, classes = llamagen(), random_codes(), torch.tensor([0, 6, CLASSES])
    model = build(imported_llamagen(gpt, freqs_cis=torch.zeros(1 + SIDE**2, 8, 2)))
    labels = torch.tensor([0, 6, -1])  # the last class is the null class
    torch.testing.assert_close(model(codes, labels), gpt(codes, classes, SIDE), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_prefix_of_llamagen_is_not_rotated_like_a_code():
    found = imported_llamagen(llamagen())
    model, turned = build(found), build(
        dataclasses.replace(found, config=dataclasses.replace(found.config, positions="rope"))
    )
    labels = torch.tensor([0, 6, -1])
    assert not torch.allclose(model(random_codes(), labels), turned(random_codes(), labels), atol=1e-3)


@torch.no_grad()
def test_cached_logits_of_llamagen_are_those_of_whole_sequences():
    found = imported_llamagen(llamagen())
    model, codes, labels = build(found), random_codes(), torch.tensor([2, 5, -1])
    cache = KVCache(found.config, 3, found.config.num_positions, torch.float32, "cpu")
    steps = [model.prefill(labels, cache)] + [model.step(codes[:, n], cache) for n in range(NUM_CODES - 1)]
    torch.testing.assert_close(torch.stack(steps, 1), model(codes, labels), atol=1e-5, rtol=1e-5)


def gpt_shapes(block_size, vocabulary=48):
    """Names and shapes of the tensors of a published Net2NetTransformer's GPT, as its checkpoints list them."""
    linear = {
        "attn.key": (WIDTH, WIDTH),
        "attn.query": (WIDTH, WIDTH),
        "attn.value": (WIDTH, WIDTH),
        "attn.proj": (WIDTH, WIDTH),
    }
    linear |= {"mlp.0": (4 * WIDTH, WIDTH), "mlp.2": (WIDTH, 4 * WIDTH)}
    found = {
        "pos_emb": (1, block_size, WIDTH),
        "tok_emb.weight": (vocabulary, WIDTH),
        "head.weight": (vocabulary, WIDTH),
    }
    norms = ["ln_f"]
    for layer in range(LAYERS):
        norms += [f"blocks.{layer}.ln1", f"blocks.{layer}.ln2"]
        found[f"blocks.{layer}.attn.mask"] = (1, 1, block_size, block_size)
        for name, shape in linear.items():
            found |= {f"blocks.{layer}.{name}.weight": shape, f"blocks.{layer}.{name}.bias": shape[:1]}
    return found | {f"{norm}.{part}": (WIDTH,) for norm in norms for part in ("weight", "bias")}


def test_the_reference_list_of_tensors_is_met():
    """Every name and shape of a published checkpoint is taken, the original's own module has the same, and none may be missing."""
    shapes = gpt_shapes(NUM_CODES)
    assert {name: tuple(tensor.shape) for name, tensor in compvis_gpt(NUM_CODES).state_dict().items()} == shapes
    masks = torch.ones(NUM_CODES, NUM_CODES).tril()[None, None]
    tensors = {f"transformer.{n}": masks if n.endswith("mask") else torch.zeros(shape) for n, shape in shapes.items()}
    taken = take_transformer(
        Foreign("last.ckpt", tensors, {}), codes_tokenizer(), project=project("__is_unconditional__")
    )
    assert taken.weights.keys() == Transformer(taken.config).state_dict().keys()
    for name in tensors:
        if not name.endswith("attn.mask"):  # a constant
            rest = {other: tensor for other, tensor in tensors.items() if other != name}
            with pytest.raises(TesseraError):
                take_transformer(
                    Foreign("last.ckpt", rest, {}), codes_tokenizer(), project=project("__is_unconditional__")
                )
