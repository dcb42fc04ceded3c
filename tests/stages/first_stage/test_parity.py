"""The first stage against the original code with the same weights."""

import re
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from foreign_support import foreign
from oracles import diffusers_vq_model, taming
from safetensors.torch import save_file

from stages.first_stage.architecture import build_tokenizer, infer_config
from stages.first_stage.artefact import fingerprint
from stages.first_stage.foreign import Foreign
from stages.first_stage.import_export import TRAINING_ONLY, export_tokenizer, import_tokenizer
from stages.first_stage.names import count_levels, detect_format, renamer
from stages.first_stage.tokenizer import Tokenizer
from stages.first_stage.tokenizer_config import TokenizerConfig

SMALL = dict(
    resolution=256,
    in_channels=3,
    codebook_size=64,
    codebook_dim=8,
    base_channels=32,
    channel_multipliers=(1, 1, 2),
    num_res_blocks=2,
    attention_resolutions=(64,),
    z_channels=16,
)
# The published sizes: CompVis f16-1024, LlamaGen's VQ-16 and VQ-8, GumbelVQ f8-8192, and latent-diffusion's vq-f4, vq-f8 and vq-f16.
F16 = dict(SMALL, base_channels=128, channel_multipliers=(1, 1, 2, 2, 4), attention_resolutions=(16,), z_channels=256)
F8 = dict(F16, channel_multipliers=(1, 1, 2, 4), attention_resolutions=(32,))
PUBLISHED = {
    "f16-1024": (dict(F16, codebook_size=1024, codebook_dim=256), 72_141_699),
    "vq-16": (dict(F16, codebook_size=16384), 71_883_403),
    "vq-8": (dict(F8, codebook_size=16384, channel_multipliers=(1, 2, 2, 4)), 70_109_835),
    "gumbel-f8": (dict(F8, codebook_size=8192, codebook_dim=256, quantizer="gumbel"), 68_995_971),
    "ldm-f4": (
        dict(F16, codebook_size=8192, codebook_dim=3, z_channels=3, channel_multipliers=(1, 2, 4), attention_resolutions=()),
        55_322_782,
    ),
    "ldm-f8": (
        dict(F8, codebook_size=16384, codebook_dim=4, z_channels=4, channel_multipliers=(1, 2, 2, 4)),
        67_717_295,
    ),
    "ldm-f16": (dict(F16, codebook_size=16384, z_channels=8), 69_593_371),
    "seg-182": (dict(F16, in_channels=182, codebook_size=1024, codebook_dim=256), 72_554_294),
}
# What the projects themselves call the tensors of such models: the list, its naming and its length.
LISTS = {
    ("f16-1024", "compvis"): ("compvis_vqgan_keys.txt", 398),
    ("vq-16", "llamagen"): ("llamagen_vq16_keys.txt", 344),
    ("vq-8", "llamagen"): ("llamagen_vq8_keys.txt", 300),
    ("vq-16", "diffusers"): ("diffusers_vqmodel_keys.txt", 343),
}


def randomise(module, seed=0):
    """Random weights everywhere, norms and biases included, of a size that keeps activations near 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in sorted(module.state_dict().items()):
            if tensor.is_floating_point():
                scale = tensor[0].numel() ** -0.5 if tensor.dim() > 1 else 0.1
                is_norm_weight = tensor.dim() == 1 and name.endswith("weight")
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * scale + is_norm_weight)
    return module.eval()


def compvis(config):
    """The original `VQModel` or `GumbelVQ` of this architecture, without its losses."""
    vqgan = taming("models.vqgan")
    network = dict(
        double_z=False,
        z_channels=config.z_channels,
        resolution=config.resolution,
        in_channels=config.in_channels,
        out_ch=config.in_channels,
        ch=config.base_channels,
        ch_mult=list(config.channel_multipliers),
        num_res_blocks=config.num_res_blocks,
        attn_resolutions=list(config.attention_resolutions),
        dropout=0.0,
    )
    loss = {"target": "taming.modules.losses.vqperceptual.DummyLoss"}
    sizes = dict(ddconfig=network, lossconfig=loss, n_embed=config.codebook_size, embed_dim=config.codebook_dim)
    if config.quantizer == "gumbel":
        schedule = {"target": "builtins.dict"}
        return randomise(vqgan.GumbelVQ(**sizes, temperature_scheduler_config=schedule))
    return randomise(vqgan.VQModel(**sizes))


def published(name):
    return pytest.param(PUBLISHED[name][0], 256, marks=pytest.mark.slow, id=name)


SIZES = [pytest.param(SMALL, 32, id="small"), pytest.param(dict(SMALL, in_channels=1, attention_resolutions=()), 24, id="grey")]


def shapes(module):
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize("name", PUBLISHED)
def test_names_shapes_and_sizes_are_those_of_the_published_models(name):
    changes, num_parameters = PUBLISHED[name]
    config = TokenizerConfig(**changes)
    with torch.device("meta"):
        assert shapes(Tokenizer(config)) == shapes(compvis(config))
    assert sum(torch.Size(shape).numel() for shape in shapes(Tokenizer(config)).values()) == num_parameters


@pytest.mark.parametrize("changes,side", [*SIZES, *map(published, ("f16-1024", "ldm-f4", "ldm-f8", "ldm-f16"))])
@torch.no_grad()
def test_codes_and_images_are_those_of_the_original(tmp_path, changes, side):
    config = TokenizerConfig(**changes)
    original = compvis(config)
    torch.save({"state_dict": original.state_dict()}, tmp_path / "last.ckpt")
    ours = import_tokenizer(str(tmp_path / "last.ckpt"))
    images = torch.rand(2, config.in_channels, side, side) * 2 - 1
    quantized, _, (_, _, codes) = original.encode(images)
    torch.testing.assert_close(ours.encoder(images), original.encoder(images), atol=1e-5, rtol=1e-5)
    assert torch.equal(ours.encode(images).flatten(), codes)
    grid = (2, *ours.grid(side))
    torch.testing.assert_close(ours.quantize.decode(codes.view(grid)), quantized, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.decode(codes.view(grid)), original.decode(quantized), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("changes,side", [pytest.param(dict(SMALL, z_channels=8), 32, id="small"), published("gumbel-f8")])
@torch.no_grad()
def test_gumbel_codes_are_the_likeliest_of_the_original(tmp_path, changes, side):
    """The original draws noise even when it encodes; without it, it takes the argmax of its logits."""
    original = compvis(TokenizerConfig(**{**changes, "quantizer": "gumbel"}))
    torch.save({"state_dict": original.state_dict()}, tmp_path / "last.ckpt")
    ours, images = import_tokenizer(str(tmp_path / "last.ckpt")), torch.rand(1, 3, side, side) * 2 - 1
    logits = original.quantize.proj(original.quant_conv(original.encoder(images)))
    codes = ours.encode(images)
    assert torch.equal(codes, logits.argmax(1).flatten(1))
    entries = F.one_hot(codes.view(1, *ours.grid(side)), ours.codebook_size).float() @ original.quantize.embed.weight
    expected = original.decode(entries.permute(0, 3, 1, 2).contiguous())
    torch.testing.assert_close(ours.decode(codes.view(1, *ours.grid(side))), expected, atol=1e-5, rtol=1e-5)


def spread_codebook(model):
    """Unit entries as far from ties as random ones are, so that all three projects must agree on every code."""
    model.quantize.embedding.weight.copy_(F.normalize(model.quantize.embedding.weight, dim=-1))
    return model


@pytest.mark.parametrize("changes,side", [*SIZES[:1], published("vq-16")])
@torch.no_grad()
def test_three_projects_agree_on_codes_and_images(tmp_path, changes, side):
    """One set of weights under three names: one fingerprint, and diffusers' own `VQModel` computes what ours does."""
    config = TokenizerConfig(**changes)
    model = spread_codebook(randomise(Tokenizer(config)).requires_grad_(False))
    torch.save({"state_dict": foreign(model, "compvis")}, tmp_path / "last.ckpt")
    torch.save({"model": foreign(model, "llamagen")}, tmp_path / "vq.pt")
    folder = tmp_path / "diffusers"
    export_tokenizer(model, "diffusers", str(folder))
    ours = [import_tokenizer(str(tmp_path / name)) for name in ("last.ckpt", "vq.pt", "diffusers")]
    assert len({tokenizer.fingerprint for tokenizer in ours}) == 1
    theirs, images = diffusers_vq_model().from_pretrained(str(folder)).eval(), torch.rand(2, 3, side, side) * 2 - 1
    quantized, _, (_, _, codes) = theirs.quantize(theirs.encode(images).latents)
    expected = theirs.decode(quantized, force_not_quantize=True).sample
    for tokenizer in ours:
        assert torch.equal(tokenizer.encode(images).flatten(), codes)
        grid = (2, *tokenizer.grid(side))
        torch.testing.assert_close(tokenizer.decode(codes.view(grid)), expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_diffusers_normalises_the_same_groups(tmp_path):
    model = spread_codebook(randomise(Tokenizer(TokenizerConfig(**SMALL, num_norm_groups=8))).requires_grad_(False))
    export_tokenizer(model, "diffusers", str(tmp_path))
    theirs, images = diffusers_vq_model().from_pretrained(str(tmp_path)).eval(), torch.rand(2, 3, 32, 32) * 2 - 1
    ours = import_tokenizer(str(tmp_path))
    assert ours.config.num_norm_groups == 8 and ours.fingerprint == fingerprint(model)
    quantized, _, (_, _, codes) = theirs.quantize(theirs.encode(images).latents)
    assert torch.equal(ours.encode(images).flatten(), codes)
    expected = theirs.decode(quantized, force_not_quantize=True).sample
    torch.testing.assert_close(ours.decode(codes.view(2, *ours.grid(32))), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name,format", LISTS)
def test_the_reference_lists_of_tensors_are_met(name, format):
    """Every name and shape of a published checkpoint is either the tokenizer's or one that only its training needs."""
    file, length = LISTS[name, format]
    listed = re.findall(r"^([\w.]+)\t\(([\d, ]*)\)$", (Path(__file__).parent / file).read_text(), re.MULTILINE)
    with torch.device("meta"):
        tensors = {name: torch.empty([int(size) for size in re.findall(r"\d+", shape)]) for name, shape in listed}
        ours = foreign(Tokenizer(TokenizerConfig(**PUBLISHED[name][0])), format)
    published = Foreign(file, tensors, {}).without(TRAINING_ONLY)
    assert len(tensors) == length and detect_format(list(tensors)) == format
    assert {name: t.shape for name, t in published.tensors.items()} == {name: t.shape for name, t in ours.items()}
    rename = renamer(format, count_levels(list(tensors), format))
    config = infer_config(published, rename)
    assert config == TokenizerConfig(**PUBLISHED[name][0])
    assert build_tokenizer(config, published.tensors, rename, file).config == config


def test_the_diffusers_model_of_weights_it_saved_itself_is_taken(tmp_path):
    model = randomise(diffusers_vq_model()(norm_num_groups=32, block_out_channels=(64,), latent_channels=4))
    save_file({name: t.contiguous() for name, t in model.state_dict().items()}, tmp_path / "weights.safetensors")
    assert import_tokenizer(str(tmp_path / "weights.safetensors")).codebook_size == 256


def test_the_oracles_leave_no_stand_ins_behind():
    taming("models.vqgan")
    assert not {"pytorch_lightning", "transformers", "torchvision"} & sys.modules.keys()
