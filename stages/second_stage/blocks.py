"""What a transformer may have in place of the default pieces, as published models of other projects do.

The originals of Esser et al. 2020 (minGPT) have LayerNorm, GELU, biases and a learned vector per position; LlamaGen
(Sun et al. 2024) has the default pieces, but its prefix takes no part in the rotation's products.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stages.second_stage.operations import Linear, RMSNorm


class Gelu(nn.Module):
    """down(gelu(up(x))) with the exact GELU (Hendrycks and Gimpel 2016)."""

    def __init__(self, hidden_size: int, ffn_size: int, bias: bool):
        super().__init__()
        self.up = Linear(hidden_size, ffn_size, bias)
        self.down = Linear(ffn_size, hidden_size, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


def make_norm(kind: str, size: int, eps: float) -> nn.Module:
    """The normalisation of a block: "rms" or "layer"."""
    return RMSNorm(size, eps) if kind == "rms" else nn.LayerNorm(size, eps=eps)


def silence_prefix(cos_TD: Tensor, num_prefix_tokens: int) -> Tensor:
    """Cosines that are zero at the prefix: with the zero sines there, queries and keys of the prefix become zero.

    LlamaGen pads its table of rotations with zeros, so that every later position gives the prefix the score 0.
    """
    is_code_T1 = torch.arange(len(cos_TD), device=cos_TD.device)[:, None] >= num_prefix_tokens
    return cos_TD * is_code_T1
