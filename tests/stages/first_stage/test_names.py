"""The three namings: one to one, and equal to what the projects themselves call their tensors."""

import pytest
import torch

from stages.first_stage.names import FORMATS, count_levels, current, detect_format, is_attention_matrix, renamer
from stages.first_stage.tokenizer import Tokenizer
from stages.first_stage.tokenizer_config import TokenizerConfig

# Of the published f16 models; the left column is CompVis.
EXAMPLES = [
    ("encoder.conv_in.weight", "encoder.conv_in.weight", "encoder.conv_in.weight"),
    (
        "encoder.down.2.block.0.nin_shortcut.bias",
        "encoder.conv_blocks.2.res.0.nin_shortcut.bias",
        "encoder.down_blocks.2.resnets.0.conv_shortcut.bias",
    ),
    (
        "encoder.down.4.attn.1.q.weight",
        "encoder.conv_blocks.4.attn.1.q.weight",
        "encoder.down_blocks.4.attentions.1.to_q.weight",
    ),
    (
        "encoder.down.0.downsample.conv.weight",
        "encoder.conv_blocks.0.downsample.conv.weight",
        "encoder.down_blocks.0.downsamplers.0.conv.weight",
    ),
    ("encoder.mid.block_2.norm1.bias", "encoder.mid.2.norm1.bias", "encoder.mid_block.resnets.1.norm1.bias"),
    ("decoder.mid.attn_1.proj_out.bias", "decoder.mid.1.proj_out.bias", "decoder.mid_block.attentions.0.to_out.0.bias"),
    ("decoder.mid.attn_1.norm.weight", "decoder.mid.1.norm.weight", "decoder.mid_block.attentions.0.group_norm.weight"),
    (
        "decoder.up.4.upsample.conv.weight",
        "decoder.conv_blocks.0.upsample.conv.weight",
        "decoder.up_blocks.0.upsamplers.0.conv.weight",
    ),
    (
        "decoder.up.0.block.2.conv2.weight",
        "decoder.conv_blocks.4.res.2.conv2.weight",
        "decoder.up_blocks.4.resnets.2.conv2.weight",
    ),
    ("decoder.norm_out.weight", "decoder.norm_out.weight", "decoder.conv_norm_out.weight"),
    ("quantize.embedding.weight", "quantize.embedding.weight", "quantize.embedding.weight"),
    ("post_quant_conv.bias", "post_quant_conv.bias", "post_quant_conv.bias"),
]


@pytest.fixture(scope="module")
def f16_names() -> list[str]:
    config = TokenizerConfig(
        resolution=256,
        in_channels=3,
        codebook_size=16384,
        codebook_dim=8,
        base_channels=128,
        channel_multipliers=(1, 1, 2, 2, 4),
        num_res_blocks=2,
        attention_resolutions=(16,),
        z_channels=256,
    )
    with torch.device("meta"):
        return list(Tokenizer(config).state_dict())


@pytest.mark.parametrize("names", EXAMPLES)
def test_names_are_those_of_the_projects(names):
    assert tuple(renamer(format, 5)(names[0]) for format in FORMATS) == names


@pytest.mark.parametrize("format", FORMATS)
def test_every_tensor_has_a_name_of_its_own(f16_names, format):
    renamed = [renamer(format, 5)(name) for name in f16_names]
    assert len(set(renamed)) == len(f16_names) == 343
    assert detect_format(renamed) == format
    assert count_levels(renamed, format) == 5


def test_only_attention_projections_are_matrices(f16_names):
    matrices = [name for name in f16_names if is_attention_matrix(name)]
    # Two and three blocks with attention at 16 pixels, one in the middle of either half; four projections each.
    assert len(matrices) == (2 + 3 + 1 + 1) * 4
    assert all(".norm." not in name for name in matrices)


def test_other_tensors_are_not_recognised():
    assert detect_format(["model.layers.0.weight", "encoder.downward.0.weight"]) is None


def test_older_diffusers_names_are_understood():
    assert current("decoder.mid_block.attentions.0.proj_attn.bias") == "decoder.mid_block.attentions.0.to_out.0.bias"
    assert current("encoder.mid_block.attentions.0.query.weight") == "encoder.mid_block.attentions.0.to_q.weight"
    assert current("encoder.conv_in.weight") == "encoder.conv_in.weight"
