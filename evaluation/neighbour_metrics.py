"""Metrics of nearest neighbours among features: precision and recall, density and coverage, and memorisation."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evaluation.estimates import Estimate, jackknife, mean_estimate
from evaluation.set_metric import FeatureMetric

CHUNK_ROWS = 1024
PRECISION_NEIGHBOURS, DENSITY_NEIGHBOURS = 3, 5
COPY_QUANTILE = 0.01


def distances(x_ND: Tensor, y_MD: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Squared Euclidean distances (c, m) of CHUNK_ROWS rows of x at a time to all of y, with the slice of x."""
    y_norms = y_MD.square().sum(1)
    for start in range(0, len(x_ND), CHUNK_ROWS):
        part = slice(start, min(start + CHUNK_ROWS, len(x_ND)))
        x = x_ND[part]
        yield part, (x.square().sum(1)[:, None] + y_norms - 2.0 * x @ y_MD.T).clamp_min(0.0)


def radii(x_ND: Tensor, k: int, left_out: list[Tensor]) -> Tensor:
    """Squared distance of each x to its k-th nearest other x, float64 (1 + K, n): among all, and then without those of
    each mask of `left_out` (bool (n,))."""
    found = torch.empty(1 + len(left_out), len(x_ND), dtype=torch.float64)
    for part, d in distances(x_ND, x_ND):
        own = torch.arange(part.start, part.stop)
        d[own - part.start, own] = torch.inf
        found[0, part] = d.kthvalue(k, dim=1).values
        for i, mask in enumerate(left_out, start=1):
            found[i, part] = d.masked_fill(mask, torch.inf).kthvalue(k, dim=1).values
    return found


class _NeighbourMetric(FeatureMetric):
    is_pairwise = True
    higher_is_better = True

    def left_out(self) -> list[list[int]]:
        """The blocks that each statistic of the jackknife goes without; none without error bars."""
        return [[block] for block in range(self.num_blocks)] if self.num_blocks > 1 else []

    def jackknifed(self, shares: Sequence[float], num_images: int) -> Estimate:
        """The estimate of a share from that of all images and those of `left_out`. A share that depends on the nearest of many images
        has no bias of order 1/n that could be taken away: what would be is far more, and the result may exceed 1."""
        value, *others = shares
        found = jackknife(value, others[: self.num_blocks], num_images, others[self.num_blocks :])
        return dataclasses.replace(found, bias_corrected=None)


class PrecisionRecall(_NeighbourMetric):
    """Improved precision and recall with k = 3 (Kynkäänniemi et al. 2019).

    precision: share of the images inside the reference's manifold, the union of balls around its features that reach to
    their k-th neighbour. recall: share of the reference inside the manifold of the images.
    """

    parts = ("precision", "recall")
    num_neighbours = PRECISION_NEIGHBOURS

    def left_out(self) -> list[list[int]]:
        """Pairs of blocks, too: recall varies by how images lie to each other, which the jackknife counts twice."""
        pairs = [[block, block + 1] for block in range(0, self.num_blocks - 1, 2)]
        return super().left_out() + (pairs if self.num_blocks > 2 else [])

    def estimates(self) -> dict[str, Estimate]:
        x, blocks = self.kept()
        y = self.reference_features()
        y_radii = radii(y, PRECISION_NEIGHBOURS, [])[0]
        masks = [torch.isin(blocks, torch.tensor(left_out)) for left_out in self.left_out()]
        x_radii = radii(x, PRECISION_NEIGHBOURS, masks)
        for row, mask in zip(x_radii[1:], masks, strict=True):
            row[mask] = -1.0  # no ball at all
        inside = torch.cat([(d <= y_radii).any(1) for _, d in distances(x, y)])
        covered = torch.stack(
            [torch.cat([(d <= row).any(1) for _, d in distances(y, x)]).double().mean() for row in x_radii]
        ).tolist()
        return {
            "precision": mean_estimate(inside.numpy()),
            "recall": self.jackknifed(covered, len(x)),
        }


class DensityCoverage(_NeighbourMetric):
    """Density and coverage with k = 5 (Naeem et al. 2020), which single outliers cannot inflate.

    density: how many of the reference's balls an image lies in, as a multiple of k; 1 is what real images have.
    coverage: share of the reference's balls with an image in them.
    """

    parts = ("density", "coverage")
    num_neighbours = DENSITY_NEIGHBOURS

    def estimates(self) -> dict[str, Estimate]:
        x, blocks = self.kept()
        y = self.reference_features()
        y_radii = radii(y, DENSITY_NEIGHBOURS, [])[0]
        depth, hits = [], torch.zeros(self.num_blocks, len(y), dtype=torch.bool)
        for part, d in distances(x, y):
            is_inside = d <= y_radii
            depth.append(is_inside.double().sum(1) / DENSITY_NEIGHBOURS)
            for block in range(self.num_blocks):
                hits[block] |= is_inside[blocks[part] == block].any(0)
        kept = [[block for block in range(self.num_blocks) if block not in left_out] for left_out in ([], *self.left_out())]
        return {
            "density": mean_estimate(torch.cat(depth).numpy()),
            "coverage": self.jackknifed([float(hits[rows].any(0).double().mean()) for rows in kept], len(x)),
        }


class NearestTraining(FeatureMetric):
    """Distance to the nearest of the reference's training images: what shows memorisation, which no distance between
    sets can (Esser et al. 2020, appendix; Meehan et al. 2020)."""

    is_pairwise = True
    higher_is_better = None

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._found: tuple[list[Any], tuple[np.ndarray, np.ndarray]] | None = None

    def nearest(self) -> tuple[np.ndarray, np.ndarray]:
        """Per image: Euclidean distance float64 (n,) to the nearest reference image, and which it is, int64 (n,).

        Kept until there are other images or another reference: several values rest on it.
        """
        made_from = [self.reference, *([self.rows] if isinstance(self.rows, Tensor) else self.rows)]
        if self._found is None or [*map(id, self._found[0])] != [*map(id, made_from)]:
            rows, _ = self.kept()
            found = [d.min(1) for _, d in distances(rows, self.reference_features())]
            nearest, which = (torch.cat([getattr(f, name) for f in found]) for name in ("values", "indices"))
            self._found = made_from, (nearest.sqrt().numpy(), which.numpy())
        return self._found[1]

    def estimates(self) -> dict[str, Estimate]:
        return {"": mean_estimate(self.nearest()[0])}


def copied_share(samples: NearestTraining, holdout: NearestTraining) -> Estimate:
    """Share of samples nearer to a training image than all but 1 % of the held-out images are: about 0.01 without memorisation, and
    1 / (n + 1) with n < 99 held-out images."""
    return share_beyond(-samples.nearest()[0], -holdout.nearest()[0])


def share_beyond(values_N: np.ndarray, ordinary_M: np.ndarray) -> Estimate:
    """Share of values above all but COPY_QUANTILE of the ordinary ones. Of values that are ordinary themselves it expects that share,
    for Weibull's is the quantile beyond which a new value lies with this probability; its error bar counts that the limit is from
    some images only."""
    found = mean_estimate(values_N > np.quantile(ordinary_M, 1.0 - COPY_QUANTILE, method="weibull"))
    if found.standard_error is None:
        return found
    of_limit = math.sqrt(COPY_QUANTILE * (1.0 - COPY_QUANTILE) / len(ordinary_M))
    return dataclasses.replace(found, standard_error=math.hypot(found.standard_error, of_limit))
