"""How much of a codebook is in use."""

from typing import NamedTuple

from torch import Tensor


class CodebookHealth(NamedTuple):
    """Of the empirical distribution of codes."""

    usage: float  # share of entries that occur at all, in [0, 1]
    perplexity: float  # exp(entropy), in [1, K]
    entropy: float  # bits per code, in [0, log2 K]


def codebook_health(counts_K: Tensor) -> CodebookHealth:
    """Health of a codebook whose entries occurred so often (integers); of one that was never used, the worst."""
    total = counts_K.sum()
    if total == 0:
        return CodebookHealth(0.0, 1.0, 0.0)
    p_K = counts_K.double() / total
    bits = -(p_K * p_K.clamp_min(1e-300).log2()).sum().item()
    return CodebookHealth((counts_K > 0).double().mean().item(), 2.0**bits, bits)
