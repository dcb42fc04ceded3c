"""Fréchet distance between two Gaussians fitted to features (Dowson and Landau 1982; as FID: Heusel et al. 2017).

    |m1 - m2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2)

With S2 = B B^T the last trace is the sum of the roots of the eigenvalues of B^T S1 B, which is symmetric: real and
non-negative by construction, and several times as fast as a matrix square root. B belongs to the reference and is
computed once.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

from evaluation.estimates import Estimate, jackknife
from evaluation.statistics import GaussianStatistics, merge, merge_all, subtract


@dataclass(frozen=True, eq=False)
class Reference:
    """Statistics to measure against, with the factor B of their covariance, float64 (d, r): covariance = B B^T."""

    statistics: GaussianStatistics
    factor: np.ndarray

    @staticmethod
    def of(statistics: GaussianStatistics) -> "Reference":
        """A reference from statistics of at least two vectors."""
        return Reference(statistics, covariance_factor(statistics.covariance))


def covariance_factor(covariance: np.ndarray) -> np.ndarray:
    """B, float64 (d, r), with B B^T = covariance (d, d); r is its numerical rank."""
    eigenvalues, vectors = np.linalg.eigh(covariance)
    floor = max(float(eigenvalues[-1]), 0.0) * len(eigenvalues) * np.finfo(np.float64).eps
    kept = eigenvalues > floor
    return vectors[:, kept] * np.sqrt(eigenvalues[kept])


def frechet_distance(statistics: GaussianStatistics, reference: Reference) -> float:
    """Fréchet distance to a reference, in squared feature units, never below zero. Both need two vectors or more."""
    covariance, factor = statistics.covariance, reference.factor
    eigenvalues = np.linalg.eigvalsh(factor.T @ covariance @ factor)
    trace_of_root = np.sqrt(np.maximum(eigenvalues, 0.0)).sum()
    difference = statistics.mean - reference.statistics.mean
    # tr S2 is taken from B, so that what was cut off the rank is missing on both sides of the difference.
    traces = np.trace(covariance) + np.square(factor).sum()
    return max(float(difference @ difference + traces - 2.0 * trace_of_root), 0.0)


def frechet_estimate(blocks: Sequence[GaussianStatistics], reference: Reference, num_threads: int = 1) -> Estimate:
    """Distance of all blocks together, with jackknife standard error and bias-corrected value.

    The error bar is that of drawing other images; the reference counts as fixed. The correction removes the bias of
    order 1/n, which is all of it once n is well above d (reference: Chong and Forsyth 2020 on that bias).

    Args:
        blocks: statistics of K disjoint sets of images of about equal size.
        reference: what to measure against.
        num_threads: distances computed at a time.
    """
    total = merge_all(blocks)
    sets = [total, *(subtract(total, block) for block in blocks)]
    with ThreadPoolExecutor(num_threads) as threads:
        value, *without_block = threads.map(lambda statistics: frechet_distance(statistics, reference), sets)
    return jackknife(value, without_block, total.n)


class FrechetDistance(Metric):
    """Fréchet distance as a torchmetrics Metric whose state merges exactly over processes.

    The state is one float64 tensor (d + 2, d): n (repeated), mean, M2. Reduction and `merge_state` are Chan's rule.

    Args:
        reference: statistics to measure against.
        extractor: maps uint8 images (n, H, W, C) to float features (n, d); without it `update` takes features.
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    moments: Tensor

    def __init__(self, reference: Reference, extractor: Callable[[np.ndarray], np.ndarray] | None = None, **kwargs):
        super().__init__(**kwargs)
        self.reference = reference
        self.extractor = extractor
        empty = GaussianStatistics.empty(len(reference.statistics.mean))
        self.add_state("moments", default=_pack(empty), dist_reduce_fx=_merge_packed, persistent=True)

    @property
    def statistics(self) -> GaussianStatistics:
        """What was fed so far."""
        return _unpack(self.moments)

    def update(self, inputs: Tensor) -> None:
        """Adds features float (n, d), or images uint8 (n, H, W, C) when there is an extractor."""
        values = inputs.detach().cpu().numpy()
        features = values if self.extractor is None else self.extractor(values)
        merged = merge(self.statistics, GaussianStatistics.of(features))
        self.moments = _pack(merged).to(self.moments.device)

    def compute(self) -> Tensor:
        """The distance, a float64 scalar."""
        return torch.tensor(frechet_distance(self.statistics, self.reference), dtype=torch.float64)


def _pack(statistics: GaussianStatistics) -> Tensor:
    n = np.full((1, len(statistics.mean)), float(statistics.n))
    return torch.from_numpy(np.concatenate([n, statistics.mean[None], statistics.m2]))


def _unpack(moments: Tensor) -> GaussianStatistics:
    values = moments.cpu().numpy()
    return GaussianStatistics(int(values[0, 0]), values[1], values[2:])


def _merge_packed(stacked: Tensor) -> Tensor:
    return _pack(merge_all(_unpack(moments) for moments in stacked))
