"""Mean and covariance of features, in a form that can be summed over actors and taken apart again.

(n, mean, M2) are kept in float64 and joined by Chan's rule, which loses nothing where a plain sum of squares does
(reference: Chan, Golub, LeVeque 1983, "Algorithms for computing the sample variance").
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class GaussianStatistics:
    """First two moments of n feature vectors of width d.

    Attributes:
        n: number of vectors.
        mean: float64 (d,).
        m2: float64 (d, d), sum of outer products of the centred vectors.
    """

    n: int
    mean: np.ndarray
    m2: np.ndarray

    @staticmethod
    def empty(num_features: int) -> "GaussianStatistics":
        """Statistics of no vectors: the neutral element of `merge`."""
        return GaussianStatistics(0, np.zeros(num_features), np.zeros((num_features, num_features)))

    @staticmethod
    def of(features: np.ndarray) -> "GaussianStatistics":
        """Statistics of features (n, d) of any float type."""
        values = np.asarray(features, dtype=np.float64)
        if len(values) == 0:
            return GaussianStatistics.empty(values.shape[1])
        mean = values.mean(axis=0)
        centred = values - mean
        return GaussianStatistics(len(values), mean, centred.T @ centred)

    @property
    def covariance(self) -> np.ndarray:
        """Unbiased covariance, float64 (d, d); needs at least two vectors."""
        assert self.n >= 2, f"a covariance needs two vectors, there are {self.n}"
        return self.m2 / (self.n - 1)


def merge(a: GaussianStatistics, b: GaussianStatistics) -> GaussianStatistics:
    """Statistics of both sets of vectors together."""
    n = a.n + b.n
    if n == 0:
        return a
    delta = b.mean - a.mean
    mean = a.mean + delta * (b.n / n)
    return GaussianStatistics(n, mean, a.m2 + b.m2 + np.outer(delta, delta) * (a.n * b.n / n))


def merge_all(parts: Iterable[GaussianStatistics]) -> GaussianStatistics:
    """Statistics of all sets together, merged in the order given, so that the same parts give the same bits."""
    first, *rest = parts
    for part in rest:
        first = merge(first, part)
    return first


def subtract(total: GaussianStatistics, part: GaussianStatistics) -> GaussianStatistics:
    """Statistics of what is in `total` but not in `part`: the inverse of `merge`."""
    n = total.n - part.n
    assert n >= 0, f"{part.n} vectors cannot be taken out of {total.n}"
    if n == 0:
        return GaussianStatistics.empty(len(total.mean))
    mean = total.mean + (total.mean - part.mean) * (part.n / n)
    delta = part.mean - mean
    return GaussianStatistics(n, mean, total.m2 - part.m2 - np.outer(delta, delta) * (n * part.n / total.n))
