"""Convolutional encoder and decoder of the VQGAN (Esser et al. 2020; layout of CompVis/taming-transformers).

Module names are chosen so that state-dict keys equal those of the published checkpoints. Numerical parity depends on: GroupNorm
with as many groups as the model had (32 in published ones) and eps 1e-6, SiLU, padding only right and bottom before a strided
convolution, nearest-neighbour upsampling, and attention placed by the resolution the network was configured for.

Shapes: B batch, C channels, H and W spatial, L = H * W.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stages.first_stage.tokenizer_config import TokenizerConfig

NORM_EPS = 1e-6


class Norm(nn.GroupNorm):
    """GroupNorm whose statistics are computed in float32 whatever the autocast mode."""

    def __init__(self, channels: int, num_groups: int, eps: float = NORM_EPS):
        super().__init__(num_groups, channels, eps=eps)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        # The CPU's kernel reads bfloat16 itself and computes in float32, so that encoding saves two passes over memory.
        is_read_as_it_is = x_BCHW.device.type == "cpu" and not torch.is_grad_enabled()
        with torch.autocast(x_BCHW.device.type, enabled=False):
            x = x_BCHW if is_read_as_it_is else x_BCHW.float()
            normed = F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)
        return normed.to(x_BCHW.dtype)


def silu(x: Tensor) -> Tensor:
    """x * sigmoid(x); in the place of x, which must be no one else's, where nothing is learned from it."""
    return F.silu(x, inplace=not torch.is_grad_enabled())


class ResnetBlock(nn.Module):
    """norm, SiLU, 3x3 convolution, twice, around a shortcut (1x1 where the width changes)."""

    def __init__(self, in_channels: int, out_channels: int, dropout: float, num_groups: int):
        super().__init__()
        self.norm1 = Norm(in_channels, num_groups)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = Norm(out_channels, num_groups)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x_BCHW: Tensor) -> Tensor:
        hidden = self.conv1(silu(self.norm1(x_BCHW)))
        hidden = self.conv2(self.dropout(silu(self.norm2(hidden))))
        return hidden + (x_BCHW if self.nin_shortcut is None else self.nin_shortcut(x_BCHW))


class AttnBlock(nn.Module):
    """Single-head self-attention over all positions, added to its input."""

    def __init__(self, channels: int, num_groups: int):
        super().__init__()
        self.norm = Norm(channels, num_groups)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        b, c, h, w = x_BCHW.shape
        normed = self.norm(x_BCHW)
        q_BLC, k_BLC, v_BLC = (proj(normed).flatten(2).transpose(1, 2) for proj in (self.q, self.k, self.v))
        mixed_BLC = F.scaled_dot_product_attention(q_BLC[:, None], k_BLC[:, None], v_BLC[:, None])[:, 0]
        return x_BCHW + self.proj_out(mixed_BLC.transpose(1, 2).reshape(b, c, h, w))


class Downsample(nn.Module):
    """Halves the image with a strided 3x3 convolution, zero-padded on the right and bottom only."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.conv(F.pad(x_BCHW, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Doubles the image by nearest neighbour, then a 3x3 convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.conv(F.interpolate(x_BCHW, scale_factor=2.0, mode="nearest"))


class _Level(nn.Module):
    """Residual blocks of one resolution, each followed by attention where the level has it, then a change of resolution."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_blocks: int,
        config: TokenizerConfig,
        *,
        attention: bool,
        downsample: bool = False,
        upsample: bool = False,
    ):
        super().__init__()
        widths, groups = [in_channels] + [out_channels] * num_blocks, config.num_norm_groups
        self.block = nn.ModuleList(ResnetBlock(a, b, config.dropout, groups) for a, b in zip(widths, widths[1:]))
        self.attn = nn.ModuleList(AttnBlock(out_channels, groups) for _ in range(num_blocks if attention else 0))
        self.downsample = Downsample(out_channels) if downsample else None
        self.upsample = Upsample(out_channels) if upsample else None

    def forward(self, x_BCHW: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x_BCHW = block(x_BCHW)
            if len(self.attn):
                x_BCHW = self.attn[i](x_BCHW)
        if self.downsample is not None:
            x_BCHW = self.downsample(x_BCHW)
        if self.upsample is not None:
            x_BCHW = self.upsample(x_BCHW)
        return x_BCHW


class _Middle(nn.Module):
    def __init__(self, channels: int, config: TokenizerConfig):
        super().__init__()
        groups = config.num_norm_groups
        self.block_1 = ResnetBlock(channels, channels, config.dropout, groups)
        self.attn_1 = AttnBlock(channels, groups) if config.middle_attention else nn.Identity()
        self.block_2 = ResnetBlock(channels, channels, config.dropout, groups)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x_BCHW)))


class Encoder(nn.Module):
    """Images (B, in_channels, H, W) to features (B, z_channels, H / f, W / f) with f = 2 ** (number of levels - 1)."""

    def __init__(self, config: TokenizerConfig):
        super().__init__()
        widths = [config.base_channels * m for m in config.channel_multipliers]
        self.conv_in = nn.Conv2d(config.in_channels, config.base_channels, 3, padding=1)
        self.down = nn.ModuleList()
        for i, (before, width) in enumerate(zip([config.base_channels] + widths, widths)):
            attention, halves = config.resolution >> i in config.attention_resolutions, i < len(widths) - 1
            level = _Level(before, width, config.num_res_blocks, config, attention=attention, downsample=halves)
            self.down.append(level)
        self.mid = _Middle(widths[-1], config)
        self.norm_out = Norm(widths[-1], config.num_norm_groups)
        self.conv_out = nn.Conv2d(widths[-1], config.z_channels, 3, padding=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        hidden = self.conv_in(x_BCHW)
        for level in self.down:
            hidden = level(hidden)
        return self.conv_out(silu(self.norm_out(self.mid(hidden))))


class Decoder(nn.Module):
    """Features (B, z_channels, h, w) to images (B, in_channels, h * f, w * f), not squashed or clamped.

    `up` is stored from high to low resolution and run backwards, as in the published checkpoints.
    """

    def __init__(self, config: TokenizerConfig):
        super().__init__()
        widths = [config.base_channels * m for m in config.channel_multipliers]
        self.conv_in = nn.Conv2d(config.z_channels, widths[-1], 3, padding=1)
        self.mid = _Middle(widths[-1], config)
        self.up = nn.ModuleList()
        for i, (before, width) in enumerate(zip(widths[1:] + widths[-1:], widths)):
            attention = config.resolution >> i in config.attention_resolutions
            level = _Level(before, width, config.num_res_blocks + 1, config, attention=attention, upsample=i > 0)
            self.up.append(level)
        self.norm_out = Norm(widths[0], config.num_norm_groups)
        self.conv_out = nn.Conv2d(widths[0], config.in_channels, 3, padding=1)

    def forward(self, z_BCHW: Tensor) -> Tensor:
        hidden = self.mid(self.conv_in(z_BCHW))
        for level in reversed(self.up):
            hidden = level(hidden)
        return self.conv_out(silu(self.norm_out(hidden)))
