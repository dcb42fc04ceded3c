"""Fréchet distance between two Gaussians fitted to features (Dowson and Landau 1982; as FID: Heusel et al. 2017).

    |m1 - m2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2)

With S2 = B B^T the last trace is the sum of the roots of the eigenvalues of B^T S1 B, which is symmetric: real and
non-negative by construction, and several times as fast as a matrix square root. B belongs to the reference and is
computed once. It is lower triangular and the product symmetric, which together save three quarters of the multiplications.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from evaluation.estimates import Estimate, jackknife
from evaluation.statistics import GaussianStatistics, merge_all, subtract

BLOCK_SIZE = 256  # rows and columns of a product at a time
NEGATIVE = 1e-3  # of the largest eigenvalue: what float32 rounds below zero is a hundredth of that


@dataclass(frozen=True, eq=False)
class Reference:
    """What to measure against.

    Attributes:
        mean: float64 (d,).
        factor: B of the covariance, from `covariance_factor`, float64 (d, r).
        n: vectors behind it; None where statistics of others do not say.
    """

    mean: np.ndarray
    factor: np.ndarray
    n: int | None = None

    @staticmethod
    def of(statistics: GaussianStatistics) -> "Reference":
        """A reference from statistics of at least two vectors."""
        return Reference(statistics.mean, covariance_factor(statistics.covariance), statistics.n)


def covariance_factor(covariance: np.ndarray) -> np.ndarray:
    """B, float64 (d, r), with B B^T = covariance (d, d) and zeros above its diagonal; r is the numerical rank.

    Raises:
        ValueError: it has an eigenvalue clearly below zero, so it is no covariance.
    """
    eigenvalues, vectors = np.linalg.eigh(covariance)
    largest = max(float(eigenvalues[-1]), 0.0)
    if eigenvalues[0] < -NEGATIVE * largest:
        raise ValueError(f"has the eigenvalue {eigenvalues[0]:.3g}")
    floor = largest * len(eigenvalues) * np.finfo(np.float64).eps
    kept = eigenvalues > floor
    root = vectors[:, kept] * np.sqrt(eigenvalues[kept])
    r_RD: np.ndarray = np.linalg.qr(root.T, mode="r")  # type: ignore[assignment]  # numpy's stubs know one mode only
    return r_RD.T  # root^T = Q R, so that root root^T = R^T R


def congruence(s_DD: torch.Tensor, b_DR: torch.Tensor) -> torch.Tensor:
    """B^T S B, float64 (r, r), of a symmetric S (d, d) and a B (d, r) with zeros above its diagonal; only the lower triangle counts,
    and what stands above it is undefined."""
    rank = b_DR.shape[1]
    product = torch.empty(rank, rank, dtype=s_DD.dtype).T  # columns lie together, as LAPACK wants them
    for start in range(0, rank, BLOCK_SIZE):
        columns = slice(start, start + BLOCK_SIZE)
        sb_DB = s_DD[start:, start:] @ b_DR[start:, columns]
        for row in range(start, rank, BLOCK_SIZE):
            rows = slice(row, row + BLOCK_SIZE)
            torch.mm(b_DR[row:, rows].T, sb_DB[row - start :], out=product[rows, columns])
    return product


def frechet_distance(statistics: GaussianStatistics, reference: Reference) -> float:
    """Fréchet distance to a reference, in squared feature units, never below zero. Both need two vectors or more."""
    assert statistics.n >= 2, f"a covariance needs two vectors, there are {statistics.n}"
    # Arrays that come through Ray are read-only, which torch cannot be: those are copied.
    m2_DD, b_DR = (torch.from_numpy(np.require(a, requirements="W")) for a in (statistics.m2, reference.factor))
    # torch finds eigenvalues in half the time of numpy. M2 is scaled where it is a number, not a matrix.
    eigenvalues = torch.linalg.eigvalsh(congruence(m2_DD, b_DR), UPLO="L") / (statistics.n - 1)
    trace_of_root = float(eigenvalues.clamp(min=0.0).sqrt().sum())
    difference = statistics.mean - reference.mean
    # tr S2 is taken from B, so that what was cut off the rank is missing on both sides of the difference.
    traces = np.trace(statistics.m2) / (statistics.n - 1) + np.linalg.norm(reference.factor) ** 2
    return max(float(difference @ difference + traces) - 2.0 * trace_of_root, 0.0)


def frechet_estimate(blocks: Sequence[GaussianStatistics], reference: Reference, num_threads: int = 1) -> Estimate:
    """Distance of all blocks together, with jackknife standard error and bias-corrected value.

    The error bar is that of drawing other images; the reference counts as fixed. The correction removes the bias of
    order 1/n, which is all of it once n is well above d (reference: Chong and Forsyth 2020 on that bias).

    Args:
        blocks: statistics of K disjoint sets of images of about equal size; without error bar if there is one.
        reference: what to measure against.
        num_threads: distances computed at a time.
    """
    total = merge_all(blocks)
    if len(blocks) == 1:
        return Estimate(frechet_distance(total, reference), total.n)
    without = [subtract(total, block) for block in blocks]
    pairs = [subtract(without[k], blocks[k + 1]) for k in range(0, len(blocks) - 1, 2)] if len(blocks) > 2 else []
    with ThreadPoolExecutor(num_threads) as threads:
        value, *others = threads.map(lambda each: frechet_distance(each, reference), [total, *without, *pairs])
    return jackknife(value, others[: len(blocks)], total.n, others[len(blocks) :])
