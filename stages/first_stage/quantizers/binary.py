"""Quantizers without a codebook to learn: a code is the signs of a vector."""

import torch
import torch.nn.functional as F
from torch import Tensor

from stages.first_stage.quantizers.base import Quantized, Quantizer, to_map, to_vectors
from stages.first_stage.quantizers.entropy import binary_entropy_loss
from stages.first_stage.quantizers.gradients import straight_through

TEMPERATURE = 1.0


class BinaryQuantizer(Quantizer):
    """Lookup-free quantization: entries are the corners {-1, 1}^D (LFQ, Yu et al. 2024, section 3.1). Bit i is z_i > 0.

    Losses: `commitment` |z - sg[e]|^2, and `entropy`, the mean entropy of a vector's soft choice minus the entropy of
    their mean, where entries have the probabilities softmax(-|z - e|^2 / temperature), which are those of D independent bits.
    """

    kind = "lfq"

    def __init__(self, codebook_dim: int):
        super().__init__(1 << codebook_dim, codebook_dim)
        self.scale = 1.0  # of an entry's components
        self.register_buffer("powers_D", 1 << torch.arange(codebook_dim), persistent=False)
        self.powers_D: Tensor

    def compared(self, vectors_ND: Tensor) -> Tensor:
        """The vectors as they are compared with the entries."""
        return vectors_ND

    def assign(self, vectors_ND: Tensor) -> Tensor:
        return ((vectors_ND > 0) * self.powers_D).sum(-1)

    def code_vectors(self, codes: Tensor) -> Tensor:
        bits = (codes[..., None] & self.powers_D) != 0
        return torch.where(bits, self.scale, -self.scale)

    def quantize(self, z_BDHW: Tensor) -> Quantized:
        vectors_ND = self.compared(to_vectors(z_BDHW))
        codes_N = self.assign(vectors_ND)
        entries_ND = self.code_vectors(codes_N)
        return Quantized(
            z_BDHW=to_map(straight_through(vectors_ND, entries_ND), z_BDHW),
            codes_BHW=to_map(codes_N, z_BDHW)[:, 0],
            losses=self.losses(vectors_ND, entries_ND),
            vectors_ND=vectors_ND.detach(),
        )

    def losses(self, vectors_ND: Tensor, entries_ND: Tensor) -> dict[str, Tensor]:
        """What keeps vectors near their entries, and the entries in use."""
        return {
            "commitment": F.mse_loss(vectors_ND, entries_ND),
            "entropy": binary_entropy_loss(4.0 * self.scale / TEMPERATURE * vectors_ND),
        }

    def stored(self) -> tuple[str, dict[str, Tensor]]:
        return self.kind, {}


class SphericalBinaryQuantizer(BinaryQuantizer):
    """Binary spherical quantization: vectors on the unit sphere, entries {-1, 1}^D / sqrt(D) (BSQ, Zhao et al. 2024, section 4).

    The distance to an entry is bounded, so there is no `commitment`.
    """

    kind = "bsq"

    def __init__(self, codebook_dim: int):
        super().__init__(codebook_dim)
        self.scale = codebook_dim**-0.5

    def compared(self, vectors_ND: Tensor) -> Tensor:
        return F.normalize(vectors_ND, dim=-1)

    def losses(self, vectors_ND: Tensor, entries_ND: Tensor) -> dict[str, Tensor]:
        return {"entropy": super().losses(vectors_ND, entries_ND)["entropy"]}
