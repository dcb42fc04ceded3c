"""Entropies in nats of what encoders choose: small for one vector (it is sure), large over all of them (all codes are used)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from stages.first_stage.quantizers.ranks import mean_over_ranks

GROUP_BITS = 8


def entropy(p_K: Tensor) -> Tensor:
    """-sum p ln p over the last dimension; 0 ln 0 is 0."""
    return -(p_K * p_K.clamp_min(1e-12).log()).sum(-1)


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
