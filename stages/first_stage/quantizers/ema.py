"""A codebook of moving averages instead of gradients."""

import torch
from torch import Tensor

from stages.first_stage.quantizers.base import Quantized
from stages.first_stage.quantizers.nearest import totals
from stages.first_stage.quantizers.ranks import sum_over_ranks
from stages.first_stage.quantizers.vq import VectorQuantizer
from stages.options import TokenizerTrainOptions

EPSILON = 1e-5


class AverageQuantizer(VectorQuantizer):
    """Nearest entry; each entry is the moving average of the vectors that chose it (van den Oord et al. 2017, appendix A.1).

    Counts and sums are taken over all ranks, so that every rank holds the same codebook. Only `commitment` is left as a
    loss. Averages move in training mode only.
    """

    row_tensors = ("embedding.weight", "counts_K", "sums_KD")

    def __init__(self, codebook_size: int, codebook_dim: int, decay: float = 0.99):
        super().__init__(codebook_size, codebook_dim)
        self.decay = decay
        self.embedding.weight.requires_grad_(False)
        self.register_buffer("counts_K", torch.ones(codebook_size))
        self.register_buffer("sums_KD", self.embedding.weight.detach().clone())
        self.counts_K: Tensor
        self.sums_KD: Tensor

    def configure(self, options: TokenizerTrainOptions) -> None:
        super().configure(options)
        self.decay = options.codebook_decay

    def quantize(self, z_BDHW: Tensor) -> Quantized:
        quantized = super().quantize(z_BDHW)
        if self.training:
            self._update(quantized.vectors_ND, quantized.codes_BHW.flatten())
        return quantized

    def losses(self, vectors_ND: Tensor, entries_ND: Tensor) -> dict[str, Tensor]:
        return {"commitment": super().losses(vectors_ND, entries_ND)["commitment"]}

    @torch.no_grad()
    def _update(self, vectors_ND: Tensor, codes_N: Tensor) -> None:
        counts_K, sums_KD = totals(vectors_ND, codes_N, self.codebook_size)
        new_KE = sum_over_ranks(torch.cat([counts_K[:, None].to(sums_KD), sums_KD], 1))
        self.counts_K.lerp_(new_KE[:, 0], 1.0 - self.decay)
        self.sums_KD.lerp_(new_KE[:, 1:], 1.0 - self.decay)
        total = self.counts_K.sum()
        smoothed_K = (self.counts_K + EPSILON) / (total + self.codebook_size * EPSILON) * total  # Laplace
        self.embedding.weight.copy_(self.sums_KD / smoothed_K[:, None])

    def _place(self, rows_M: Tensor, entries_MD: Tensor) -> None:
        super()._place(rows_M, entries_MD)
        self.counts_K[rows_M] = 1.0
        self.sums_KD[rows_M] = entries_MD
