"""Vector quantization: nearest codebook entry, straight-through gradient, commitment and codebook losses.

Shapes: B batch, D codebook_dim, K codebook_size, N = B * h * w vectors.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Quantized(NamedTuple):
    """What the quantizer hands on in training."""

    z_BDHW: Tensor  # chosen entries, gradient passed straight through to the encoder
    codes_BHW: Tensor  # int64 in [0, K)
    codebook_loss: Tensor  # |sg[z] - e|^2, moves the codebook
    commitment_loss: Tensor  # |z - sg[e]|^2, moves the encoder
    vectors_ND: Tensor  # what was compared with the codebook (normalised for vq-l2), detached


class VectorQuantizer(nn.Module):
    """Nearest-entry quantizer (van den Oord et al. 2017, eq. 3), optionally on the unit sphere (Yu et al. 2022, section 3.2).

    With `l2_normalize` both the encoder's vectors and the codebook are normalised before they are compared and the decoder sees
    unit vectors. Distances are computed in float32 under any autocast mode.
    """

    def __init__(self, codebook_size: int, codebook_dim: int, l2_normalize: bool):
        super().__init__()
        self.l2_normalize = l2_normalize
        self.embedding = nn.Embedding(codebook_size, codebook_dim)
        if l2_normalize:
            nn.init.normal_(self.embedding.weight)
            self.embedding.weight.data = F.normalize(self.embedding.weight.data, dim=-1)
        else:
            nn.init.uniform_(self.embedding.weight, -1.0 / codebook_size, 1.0 / codebook_size)

    def codebook(self) -> Tensor:
        """Entries as the decoder sees them, float32 (K, D)."""
        weight = self.embedding.weight.float()
        return F.normalize(weight, dim=-1) if self.l2_normalize else weight

    def nearest(self, vectors_ND: Tensor) -> Tensor:
        """Index of the nearest entry per vector, int64 (N,). |z|^2 is the same for every entry and left out."""
        codebook_KD = self.codebook()
        distances_NK = torch.addmm(codebook_KD.square().sum(-1)[None], vectors_ND, codebook_KD.t(), alpha=-2.0)
        return distances_NK.argmin(-1)

    def encode(self, z_BDHW: Tensor) -> Tensor:
        """Codes of encoder features, int64 (B, h, w)."""
        with torch.autocast(z_BDHW.device.type, enabled=False):
            return self.nearest(self._vectors(z_BDHW)).view(z_BDHW.shape[0], *z_BDHW.shape[2:])

    def decode(self, codes_BHW: Tensor) -> Tensor:
        """Entries of codes, float32 (B, D, h, w)."""
        return F.embedding(codes_BHW, self.codebook()).permute(0, 3, 1, 2)

    def forward(self, z_BDHW: Tensor) -> Quantized:
        with torch.autocast(z_BDHW.device.type, enabled=False):
            vectors_ND = self._vectors(z_BDHW)
            codes_N = self.nearest(vectors_ND.detach())
            entries_ND = F.embedding(codes_N, self.codebook())
            passed_ND = vectors_ND + (entries_ND - vectors_ND).detach()
            b, d, h, w = z_BDHW.shape
            return Quantized(
                z_BDHW=passed_ND.view(b, h, w, d).permute(0, 3, 1, 2),
                codes_BHW=codes_N.view(b, h, w),
                codebook_loss=F.mse_loss(entries_ND, vectors_ND.detach()),
                commitment_loss=F.mse_loss(vectors_ND, entries_ND.detach()),
                vectors_ND=vectors_ND.detach(),
            )

    @torch.no_grad()
    def revive(self, is_dead_K: Tensor, vectors_ND: Tensor) -> int:
        """Moves unused entries onto vectors the encoder just produced, spread evenly over them; returns how many were moved."""
        dead_M = is_dead_K.nonzero().flatten()
        picks_M = torch.linspace(0, len(vectors_ND) - 1, len(dead_M), device=vectors_ND.device).long()
        self.embedding.weight[dead_M] = vectors_ND[picks_M].to(self.embedding.weight.dtype)
        return len(dead_M)

    def _vectors(self, z_BDHW: Tensor) -> Tensor:
        vectors_ND = z_BDHW.float().permute(0, 2, 3, 1).reshape(-1, z_BDHW.shape[1])
        return F.normalize(vectors_ND, dim=-1) if self.l2_normalize else vectors_ND


def usage(counts_K: Tensor) -> tuple[float, float]:
    """Share of entries used at all, and perplexity exp(entropy) of the empirical distribution, in [1, K]."""
    total = counts_K.sum()
    if total == 0:
        return 0.0, 1.0
    p_K = counts_K.double() / total
    entropy = -(p_K * p_K.clamp_min(1e-300).log()).sum()
    return (counts_K > 0).double().mean().item(), entropy.exp().item()
