"""The VQGAN: its published shape and its codes."""

import dataclasses

import pytest
import torch
from tests_support import TINY_TOKENIZER

from stages.first_stage.blocks import Downsample
from stages.first_stage.tokenizer import Tokenizer
from stages.first_stage.tokenizer_config import TokenizerConfig

TINY = dataclasses.replace(TINY_TOKENIZER, attention_resolutions=(8,))


@pytest.fixture
def tokenizer():
    torch.manual_seed(0)
    return Tokenizer(TINY).eval()


def count(module):
    return sum(p.numel() for p in module.parameters())


def test_f16_has_the_published_parameter_counts():
    config = TokenizerConfig(
        resolution=256,
        in_channels=3,
        codebook_size=1024,
        codebook_dim=256,
        base_channels=128,
        channel_multipliers=(1, 1, 2, 2, 4),
        num_res_blocks=2,
        attention_resolutions=(16,),
        z_channels=256,
    )
    with torch.device("meta"):
        tokenizer = Tokenizer(config)
    assert count(tokenizer.encoder) == 29_298_176
    assert count(tokenizer.decoder) == 42_449_795
    assert count(tokenizer) == 72_141_699
    keys = set(tokenizer.state_dict())
    assert {
        "encoder.down.4.attn.1.proj_out.bias",
        "decoder.up.3.block.0.nin_shortcut.weight",
        "decoder.up.4.attn.2.q.weight",
    } <= keys
    assert {
        "encoder.mid.attn_1.norm.weight",
        "encoder.down.0.downsample.conv.weight",
        "quantize.embedding.weight",
    } <= keys
    assert not any("down.4.downsample" in key or "up.0.upsample" in key for key in keys)


def test_downsample_pads_right_and_bottom_only():
    layer = Downsample(1)
    torch.nn.init.ones_(layer.conv.weight)
    torch.nn.init.zeros_(layer.conv.bias)
    counted = layer(torch.ones(1, 1, 4, 4))
    assert counted.flatten().tolist() == [9.0, 6.0, 6.0, 4.0]


def test_codes_have_one_entry_per_patch_and_decode_to_the_image_shape(tokenizer):
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    codes = tokenizer.encode(images)
    assert codes.shape == (2, 64) and codes.dtype == torch.int64
    assert 0 <= codes.min() and codes.max() < 32
    assert tokenizer.decode(codes.view(2, 8, 8)).shape == images.shape
    assert tokenizer.grid(16) == (8, 8)


def test_codes_do_not_depend_on_the_rest_of_the_batch(tokenizer):
    images = torch.rand(5, 3, 16, 16) * 2 - 1
    together = tokenizer.encode(images)
    alone = torch.cat([tokenizer.encode(image[None]) for image in images])
    assert torch.equal(together, alone)


def test_baked_tokenizer_gives_the_same_codes_and_pixels(tokenizer):
    images = torch.rand(4, 3, 16, 16) * 2 - 1
    baked = tokenizer.baked()
    codes = tokenizer.encode(images)
    assert baked.config.quantizer == "vq"
    assert torch.equal(baked.encode(images), codes)
    torch.testing.assert_close(baked.decode(codes.view(4, 8, 8)), tokenizer.decode(codes.view(4, 8, 8)))


def test_reconstruction_passes_gradients_to_the_encoder(tokenizer):
    reconstructions, _ = tokenizer(torch.rand(2, 3, 16, 16))
    reconstructions.square().mean().backward()
    assert tokenizer.encoder.conv_in.weight.grad.abs().sum() > 0
    assert tokenizer.quantize.embedding.weight.grad is None, "only the codebook loss moves the codebook"
