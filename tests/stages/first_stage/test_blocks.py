"""What the network does differently where nothing is learned must not show."""

import pytest
import torch

from stages.first_stage.blocks import AttnBlock, Decoder, Encoder, Norm
from stages.first_stage.tokenizer_config import TokenizerConfig

CONFIG = TokenizerConfig(
    in_channels=3,
    codebook_size=32,
    codebook_dim=4,
    base_channels=32,
    channel_multipliers=(1, 2),
    num_res_blocks=1,
    attention_resolutions=(16,),
    resolution=32,
    z_channels=8,
)


@pytest.mark.parametrize(
    "module,shape",
    [
        (Encoder(CONFIG), (2, 3, 32, 32)),
        (Decoder(CONFIG), (2, 8, 16, 16)),
        (AttnBlock(64, num_groups=32), (2, 64, 8, 8)),
    ],
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_inference_is_training_without_gradients(module, shape, layout):
    module, x = module.to(memory_format=layout), torch.randn(shape).to(memory_format=layout)
    before = x.clone()
    with torch.no_grad():
        inferred = module(x)
    assert torch.equal(inferred, module(x)) and torch.equal(x, before)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_norm_of_bfloat16_has_statistics_in_float32(layout):
    norm = Norm(64, num_groups=32)
    with torch.no_grad():
        norm.weight.normal_()
        norm.bias.normal_()
    # Far from zero, so that a mean or variance in bfloat16 would be wrong in its first digits.
    x = (torch.randn(2, 64, 32, 32) + 30.0).bfloat16().to(memory_format=layout)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        inferred = norm(x)
    assert inferred.dtype == torch.bfloat16
    torch.testing.assert_close(inferred.float(), norm(x.float()), atol=1e-2, rtol=1e-2)
