"""Maximum mean discrepancies to the reference, with error bars from sums of the kernel per pair of blocks.

Every image of both sets is compared with every other. The usual average over random subsets (Bińkowski et al. 2018)
estimates the same number with more noise, and differs from run to run.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from evaluation.estimates import Estimate, jackknife
from evaluation.set_metric import HOLDOUT, RECONSTRUCTIONS, SAMPLES, FeatureMetric

CHUNK_ROWS = 1024
CMMD_BANDWIDTH, CMMD_SCALE = 10.0, 1000.0

# From inner products of features (any shape) and the width of the features to values of the kernel.
Kernel = Callable[[Tensor, int], Tensor]


def polynomial_kernel(products: Tensor, width: int) -> Tensor:
    """(x . y / d + 1)^3."""
    return (products / width + 1.0) ** 3


def gaussian_kernel(products: Tensor, width: int) -> Tensor:
    """exp(-|x - y|^2 / (2 * 10^2)) of vectors of length 1."""
    return torch.exp((products - 1.0) / CMMD_BANDWIDTH**2)


def block_sums(kernel: Kernel, x_ND: Tensor, x_blocks: Tensor, y_MD: Tensor, y_blocks: Tensor) -> Tensor:
    """Sums of the kernel over every pair of a block of x and a block of y, float64 (K, L)."""
    rows, columns = _one_hot(x_blocks), _one_hot(y_blocks)
    sums = torch.zeros(rows.shape[1], columns.shape[1], dtype=torch.float64)
    for start in range(0, len(x_ND), CHUNK_ROWS):
        part = slice(start, start + CHUNK_ROWS)
        sums += rows[part].T @ (kernel(x_ND[part] @ y_MD.T, x_ND.shape[1]) @ columns)
    return sums


def own_values(kernel: Kernel, x_ND: Tensor) -> Tensor:
    """The kernel of each vector with itself, float64 (n,)."""
    return kernel(x_ND.square().sum(1), x_ND.shape[1])


def _one_hot(blocks: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(blocks, int(blocks.max()) + 1).double()


class _MeanDiscrepancy(FeatureMetric):
    measures = (SAMPLES, RECONSTRUCTIONS, HOLDOUT)
    is_pairwise = True
    higher_is_better = False
    kernel: Kernel
    is_unbiased: bool
    scale = 1.0

    def prepare(self, features_ND: Tensor) -> Tensor:
        """Features as the kernel takes them."""
        return features_ND

    def estimates(self) -> dict[str, Estimate]:
        rows, blocks = self.kept()
        x, y = self.prepare(rows), self.prepare(self.reference_features())
        kernel = type(self).kernel
        one = torch.zeros(len(y), dtype=torch.int64)
        within, across = block_sums(kernel, x, blocks, x, blocks), block_sums(kernel, x, blocks, y, one)[:, 0]
        # A kernel of an image with itself tells nothing about the set; the unbiased estimate leaves it out.
        diagonal = torch.zeros(len(within), dtype=torch.float64).index_add_(0, blocks, own_values(kernel, x))
        counts = torch.bincount(blocks, minlength=len(within)).double()
        reference = self._mean(block_sums(kernel, y, one, y, one)[0, 0], own_values(kernel, y).sum(), len(y))

        def value(kept: Tensor) -> float:
            n = float(counts[kept].sum())
            own = self._mean(within[kept][:, kept].sum(), diagonal[kept].sum(), n)
            return float(self.scale * (own + reference - 2.0 * across[kept].sum() / (n * len(y))))

        def value_without(*left_out: int) -> float:
            return value(torch.tensor([block not in left_out for block in range(len(within))]))

        if self.num_blocks == 1:
            return {"": Estimate(value_without(), len(x))}
        without = [value_without(block) for block in range(len(within))]
        pairs = [value_without(k, k + 1) for k in range(0, len(within) - 1, 2)] if len(within) > 2 else []
        return {"": jackknife(value_without(), without, len(x), pairs)}

    def _mean(self, total: Tensor, diagonal: Tensor, n: float) -> Tensor:
        return (total - diagonal) / (n * (n - 1)) if self.is_unbiased else total / n**2


class KernelDistance(_MeanDiscrepancy):
    """Squared MMD with a cubic kernel, unbiased: KID on FID's Inception (Bińkowski et al. 2018). Can be below zero."""

    kernel = staticmethod(polynomial_kernel)
    is_unbiased = True


class ClipMeanDiscrepancy(_MeanDiscrepancy):
    """CMMD: 1000 times the squared MMD of CLIP embeddings of length 1 with a Gaussian kernel of bandwidth 10, diagonal
    included, as published (Jayasumana et al. 2024)."""

    kernel = staticmethod(gaussian_kernel)
    is_unbiased = False
    scale = CMMD_SCALE

    def prepare(self, features_ND: Tensor) -> Tensor:
        return torch.nn.functional.normalize(features_ND, dim=1)
