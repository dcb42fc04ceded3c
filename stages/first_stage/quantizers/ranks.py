"""Sums and copies over the ranks of a training; one process alone passes through."""

import torch
import torch.distributed as dist
from torch import Tensor


def num_ranks() -> int:
    """World size of the training this process takes part in."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@torch.no_grad()
def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The sum of this tensor over the ranks, in place."""
    if num_ranks() > 1:
        dist.all_reduce(tensor)
    return tensor


@torch.no_grad()
def copy_from_first_rank(tensor: Tensor) -> Tensor:
    """The tensor of rank 0, in place."""
    if num_ranks() > 1 and tensor.numel():
        dist.broadcast(tensor, src=0)
    return tensor


def mean_over_ranks(tensor: Tensor) -> Tensor:
    """The mean of this tensor over the ranks, whose gradient goes to this rank's share.

    Averaging parameter gradients over the ranks, as data-parallel training does, then gives the gradient of what was
    computed from the mean.
    """
    if num_ranks() == 1:
        return tensor
    mean = sum_over_ranks(tensor.detach().clone()) / num_ranks()
    return tensor + (mean - tensor).detach()
