"""Entropies in nats of what encoders choose: small for one vector (it is sure), large over all of them (all codes are used)."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from stages.first_stage.quantizers.ranks import mean_over_ranks

GROUP_BITS = 8
PROBABILITIES_AT_ONCE = 1 << 26


def entropy(p_K: Tensor) -> Tensor:
    """-sum p ln p over the last dimension; 0 ln 0 is 0."""
    return -(p_K * p_K.clamp_min(1e-12).log()).sum(-1)


def choice_entropy_loss(logits_of: Callable[[Tensor], Tensor], vectors_ND: Tensor, codebook_size: int) -> Tensor:
    """Mean entropy per vector minus the entropy of the mean of softmax(logits) (Yu et al. 2024, eq. 4). Means go over all ranks.

    A few rows at a time are kept, and computed again in the backward pass, so that memory stays bounded.

    Args:
        logits_of: from some of the vectors (n, D) to their logits (n, K), float32.
        vectors_ND: all of them.
        codebook_size: K.
    """
    parts = [
        checkpoint(_sums, logits_of, rows_ND, use_reentrant=False)
        for rows_ND in vectors_ND.split(rows_at_once(codebook_size))
    ]
    per_vector = torch.stack([total for total, _ in parts]).sum() / len(vectors_ND)
    mean_K = torch.stack([p_K for _, p_K in parts]).sum(0) / len(vectors_ND)
    return per_vector - entropy(mean_over_ranks(mean_K))


def rows_at_once(codebook_size: int) -> int:
    """Vectors whose probabilities over the codebook are held at the same time."""
    return max(1, PROBABILITIES_AT_ONCE // codebook_size)


def _sums(logits_of: Callable[[Tensor], Tensor], vectors_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Summed over the vectors: entropy () and probabilities (K,)."""
    log_p_NK = logits_of(vectors_ND).log_softmax(-1)
    p_NK = log_p_NK.exp()
    return -(p_NK * log_p_NK).sum(), p_NK.sum(0)


def binary_entropy_loss(logits_ND: Tensor) -> Tensor:
    """Mean entropy per vector minus the entropy of the mean, for codes of D independent bits (Yu et al. 2024, eq. 4).

    The first is exact. The second sees the joint distribution of groups of 8 bits and takes groups as independent (Zhao et
    al. 2024, section 4.2), so it is exact for up to 8 bits. Means go over all ranks.

    Args:
        logits_ND: float32 log-odds that a bit is 1.
    """
    p_ND = logits_ND.sigmoid()
    per_vector = F.binary_cross_entropy_with_logits(logits_ND, p_ND, reduction="none").sum(-1).mean()
    of_mean = sum(entropy(mean_over_ranks(_joint(group).mean(0))) for group in p_ND.split(GROUP_BITS, -1))
    return per_vector - of_mean


def _joint(p_NG: Tensor) -> Tensor:
    """Distribution over the 2^G values of G independent bits, (N, 2^G)."""
    joint = torch.ones_like(p_NG[:, :1])
    for p_N in p_NG.unbind(-1):
        joint = torch.cat([joint * (1.0 - p_N[:, None]), joint * p_N[:, None]], -1)
    return joint
