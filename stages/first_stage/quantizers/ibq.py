"""Index backpropagation: every entry gets a gradient at every step, in proportion to how likely it was chosen."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stages.first_stage.quantizers.base import Quantized, Quantizer, to_map, to_vectors
from stages.first_stage.quantizers.entropy import entropy
from stages.first_stage.quantizers.nearest import largest_product
from stages.first_stage.quantizers.ranks import mean_over_ranks

ENTROPY_TEMPERATURE = 0.01
PROBABILITIES_AT_ONCE = 1 << 26


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
        rows = max(1, PROBABILITIES_AT_ONCE // self.codebook_size)
        parts = [
            checkpoint(_choose, vectors, codes, codebook_KD, use_reentrant=False)
            for vectors, codes in zip(vectors_ND.split(rows), codes_N.split(rows))
        ]
        chosen_ND = torch.cat([chosen for chosen, _, _ in parts])
        per_vector = sum(total for _, total, _ in parts) / len(vectors_ND)
        mean_K = mean_over_ranks(sum(p for _, _, p in parts) / len(vectors_ND))
        entries_ND = F.embedding(codes_N, codebook_KD)
        return Quantized(
            z_BDHW=to_map(chosen_ND, z_BDHW),
            codes_BHW=to_map(codes_N, z_BDHW)[:, 0],
            losses={
                "index": F.mse_loss(chosen_ND, vectors_ND),
                "codebook": F.mse_loss(entries_ND, vectors_ND.detach()),
                "commitment": F.mse_loss(vectors_ND, entries_ND.detach()),
                "entropy": per_vector - entropy(mean_K),
            },
            vectors_ND=vectors_ND.detach(),
        )

    def stored(self) -> tuple[str, dict[str, Tensor]]:
        return "ibq", dict(self.state_dict())


def _choose(vectors_ND: Tensor, codes_N: Tensor, codebook_KD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Chosen entries with their index gradient (N, D); summed over the vectors, entropy () and probabilities (K,)."""
    logits_NK = vectors_ND @ codebook_KD.t()
    soft_NK = logits_NK.softmax(-1)
    hard_NK = torch.zeros_like(soft_NK).scatter_(1, codes_N[:, None], 1.0)
    chosen_ND = (hard_NK - soft_NK.detach() + soft_NK) @ codebook_KD
    log_p_NK = (logits_NK / ENTROPY_TEMPERATURE).log_softmax(-1)
    p_NK = log_p_NK.exp()
    return chosen_ND, -(p_NK * log_p_NK).sum(), p_NK.sum(0)
