"""Searches over a codebook and where its entries start. Pure functions in float32; memory does not grow with the codebook.

Shapes: D codebook_dim, K codebook_size, N vectors.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# Fixed, so that the number of images in a batch does not decide how a distance is summed.
ENTRIES_AT_ONCE = 16_384
DISTANCES_AT_ONCE = 1 << 28  # 1 GiB


def nearest(vectors_ND: Tensor, codebook_KD: Tensor) -> Tensor:
    """Index of the entry with the smallest Euclidean distance per vector, int64 (N,); the first of equal ones.

    |z|^2 is the same for every entry and left out.
    """
    return _best(vectors_ND, codebook_KD, codebook_KD.square().sum(-1), alpha=-2.0, beta=1.0)


def largest_product(vectors_ND: Tensor, codebook_KD: Tensor) -> Tensor:
    """Index of the entry with the largest inner product per vector, int64 (N,); the first of equal ones."""
    return _best(vectors_ND, codebook_KD, codebook_KD.new_zeros(len(codebook_KD)), alpha=-1.0, beta=0.0)


def _best(vectors_ND: Tensor, codebook_KD: Tensor, offset_K: Tensor, alpha: float, beta: float) -> Tensor:
    """argmin over k of alpha * <vector, entry_k> + beta * offset_k."""
    num_entries = min(len(codebook_KD), ENTRIES_AT_ONCE)
    rows_at_once = max(1, DISTANCES_AT_ONCE // num_entries)
    found = [_best_of_rows(rows, codebook_KD, offset_K, alpha, beta) for rows in vectors_ND.split(rows_at_once)]
    return torch.cat(found)


def _best_of_rows(rows_ND: Tensor, codebook_KD: Tensor, offset_K: Tensor, alpha: float, beta: float) -> Tensor:
    smallest_N = codes_N = None
    for first in range(0, len(codebook_KD), ENTRIES_AT_ONCE):
        entries, offset = (t[first : first + ENTRIES_AT_ONCE] for t in (codebook_KD, offset_K))
        values_NK = torch.addmm(offset[None], rows_ND, entries.t(), alpha=alpha, beta=beta)
        index_N = values_NK.argmin(-1)
        values_N = values_NK.gather(1, index_N[:, None])[:, 0]
        if codes_N is None or smallest_N is None:
            smallest_N, codes_N = values_N, index_N
        else:
            codes_N = torch.where(values_N < smallest_N, index_N + first, codes_N)
            smallest_N = torch.minimum(values_N, smallest_N)
    assert codes_N is not None
    return codes_N


def kmeans(vectors_ND: Tensor, num_entries: int, num_iterations: int, is_spherical: bool) -> Tensor:
    """Lloyd's algorithm from evenly spread vectors, float32 (num_entries, D). Deterministic.

    With fewer vectors than entries every vector is an entry, and the other entries lie close beside them.

    Args:
        vectors_ND: float32; of unit length if `is_spherical`, which keeps the entries on the sphere.
        num_entries: K.
        num_iterations: of Lloyd's algorithm.
        is_spherical: entries are normalised means (spherical k-means).
    """
    entries_KD = spread(vectors_ND, num_entries)
    for _ in range(num_iterations if len(vectors_ND) > num_entries else 0):
        counts_K, sums_KD = totals(vectors_ND, nearest(vectors_ND, entries_KD), num_entries)
        means_KD = sums_KD / counts_K.clamp_min(1)[:, None]
        entries_KD = torch.where(counts_K[:, None] > 0, means_KD, entries_KD)
        entries_KD = F.normalize(entries_KD, dim=-1) if is_spherical else entries_KD
    return entries_KD


def totals(vectors_ND: Tensor, codes_N: Tensor, num_entries: int) -> tuple[Tensor, Tensor]:
    """Number (K,), int64, and sum (K, D) of the vectors of each code; the same bits on every call, on GPUs too."""
    counts_K = torch.bincount(codes_N, minlength=num_entries)
    sorted_ND = vectors_ND[codes_N.argsort(stable=True)]
    return counts_K, torch.segment_reduce(sorted_ND, "sum", lengths=counts_K, initial=0.0)


def spread(vectors_ND: Tensor, num: int) -> Tensor:
    """So many of the vectors, evenly spread over them; beyond their number, copies with a little noise."""
    picks = torch.linspace(0, len(vectors_ND) - 1, min(num, len(vectors_ND)), device=vectors_ND.device).long()
    chosen = vectors_ND[picks]
    if num <= len(vectors_ND):
        return chosen.clone()
    repeats = torch.arange(num - len(chosen), device=vectors_ND.device) % len(chosen)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(len(repeats), vectors_ND.shape[1], generator=generator).to(vectors_ND)
    return torch.cat([chosen, chosen[repeats] + 0.1 * vectors_ND.std() * noise])
