"""Index backpropagation: every entry gets a gradient at every step, in proportion to how likely it was chosen."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stages.first_stage.quantizers.base import Quantized, Quantizer, to_map, to_vectors
from stages.first_stage.quantizers.entropy import choice_entropy_loss, rows_at_once
from stages.first_stage.quantizers.nearest import largest_product

ENTROPY_TEMPERATURE = 0.01


class IndexQuantizer(Quantizer):
    """The entry with the largest inner product, with the gradient of the softmax over all of them (IBQ, Shi et al. 2024).

    Losses, as in TencentARC/SEED-Voken: `index` |z - e|^2 with the index gradient on both sides, `codebook` |sg[z] - e|^2,
    `commitment` |z - sg[e]|^2, and `entropy`, mean entropy per vector minus entropy of the mean at temperature 0.01.
    The probabilities of a few rows at a time are kept and computed again in the backward pass, so that memory stays bounded.
    """

    def __init__(self, codebook_size: int, codebook_dim: int):
        super().__init__(codebook_size, codebook_dim)
        self.embedding = nn.Embedding(codebook_size, codebook_dim)

    def assign(self, vectors_ND: Tensor) -> Tensor:
        return largest_product(vectors_ND, self.embedding.weight.float())

    def code_vectors(self, codes: Tensor) -> Tensor:
        return F.embedding(codes, self.embedding.weight.float())

    def quantize(self, z_BDHW: Tensor) -> Quantized:
        vectors_ND, codebook_KD = to_vectors(z_BDHW), self.embedding.weight.float()
        codes_N = largest_product(vectors_ND.detach(), codebook_KD.detach())
        rows = rows_at_once(self.codebook_size)
        chosen_ND = torch.cat(
            [
                checkpoint(_choose, vectors, codes, codebook_KD, use_reentrant=False)
                for vectors, codes in zip(vectors_ND.split(rows), codes_N.split(rows))
            ]
        )
        entries_ND = F.embedding(codes_N, codebook_KD)
        return Quantized(
            z_BDHW=to_map(chosen_ND, z_BDHW),
            codes_BHW=to_map(codes_N, z_BDHW)[:, 0],
            losses={
                "index": F.mse_loss(chosen_ND, vectors_ND),
                "codebook": F.mse_loss(entries_ND, vectors_ND.detach()),
                "commitment": F.mse_loss(vectors_ND, entries_ND.detach()),
                "entropy": choice_entropy_loss(
                    lambda rows_ND: rows_ND @ codebook_KD.t() / ENTROPY_TEMPERATURE, vectors_ND, self.codebook_size
                ),
            },
            vectors_ND=vectors_ND.detach(),
        )

    def stored(self) -> tuple[str, dict[str, Tensor]]:
        return "ibq", dict(self.state_dict())


def _choose(vectors_ND: Tensor, codes_N: Tensor, codebook_KD: Tensor) -> Tensor:
    """Chosen entries with their index gradient, (N, D)."""
    soft_NK = (vectors_ND @ codebook_KD.t()).softmax(-1)
    hard_NK = torch.zeros_like(soft_NK).scatter_(1, codes_N[:, None], 1.0)
    return (hard_NK - soft_NK.detach() + soft_NK) @ codebook_KD
