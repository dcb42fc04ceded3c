"""The first stage against the original code with the same weights."""

import sys

import torch
from oracles import diffusers_vq_model, taming

from stages.first_stage.tokenizer import Tokenizer, TokenizerConfig

SMALL = dict(
    resolution=32,
    in_channels=3,
    codebook_size=64,
    codebook_dim=8,
    base_channels=32,
    channel_multipliers=(1, 1, 2),
    num_res_blocks=2,
    attention_resolutions=(8,),
    z_channels=16,
)


def randomise(module, seed=0):
    """Random weights everywhere, norms and biases included, of a size that keeps activations near 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in sorted(module.state_dict().items()):
            if tensor.is_floating_point():
                scale = tensor[0].numel() ** -0.5 if tensor.dim() > 1 else 0.1
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * scale + (name.endswith("norm.weight")))
    return module.eval()


def compvis(config):
    """The original `VQModel` of this architecture, without its losses."""
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
    model = taming("models.vqgan").VQModel(network, loss, config.codebook_size, config.codebook_dim)
    return randomise(model)


def test_names_and_shapes_are_those_of_the_original():
    config = TokenizerConfig(**SMALL)
    theirs = {name: tensor.shape for name, tensor in compvis(config).state_dict().items()}
    assert theirs == {name: tensor.shape for name, tensor in Tokenizer(config).state_dict().items()}


@torch.no_grad()
def test_codes_and_images_are_those_of_the_original():
    config = TokenizerConfig(**SMALL)
    original, ours = compvis(config), Tokenizer(config).eval()
    ours.load_state_dict(original.state_dict())
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    quantized, _, (_, _, codes) = original.encode(images)
    torch.testing.assert_close(ours.encoder(images), original.encoder(images), atol=1e-5, rtol=1e-5)
    assert torch.equal(ours.encode(images).flatten(), codes)
    torch.testing.assert_close(ours.decode(codes.view(2, 8, 8)), original.decode(quantized), atol=1e-5, rtol=1e-5)


def test_the_oracle_of_diffusers_can_be_had():
    assert diffusers_vq_model()(norm_num_groups=32).config.num_vq_embeddings == 256


def test_the_oracles_leave_no_stand_ins_behind():
    taming("models.vqgan")
    assert not {"pytorch_lightning", "transformers", "torchvision"} & sys.modules.keys()
