"""The Fréchet distance as a metric: FID, sFID, rFID and FD on any extractor are this one over different features."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evaluation.estimates import Estimate
from evaluation.frechet import frechet_estimate
from evaluation.set_metric import HOLDOUT, RECONSTRUCTIONS, SAMPLES, SetMetric
from evaluation.statistics import GaussianStatistics, merge, merge_all

FOLD_ROWS = 512
DISTANCE_THREADS = 2


class GaussianMetric(SetMetric):
    """Mean and covariance of each block of features, in a state that merges by Chan's rule.

    The state is `moments`, float64 (K, d + 2, d): n (repeated), mean and M2 of every block; and the last rows that
    came. These wait until there are FOLD_ROWS per block, because folding few rows costs as much as folding many. Fed in
    the same order, the same features give the same bits however they are cut into pieces.
    """

    needs_reference = False
    moments: Tensor
    rows: list[Tensor]
    row_blocks: list[Tensor]

    def __init__(self, num_features: int, num_blocks: int = 1, **kwargs: Any):
        super().__init__(num_features, num_blocks, **kwargs)
        empty = torch.from_numpy(np.stack([_pack(GaussianStatistics.empty(num_features))] * num_blocks))
        self.add_state("moments", default=empty, dist_reduce_fx=_merge_packed, persistent=True)
        self.add_state("rows", default=[], dist_reduce_fx="cat", persistent=True)
        self.add_state("row_blocks", default=[], dist_reduce_fx="cat", persistent=True)

    def add(self, features_ND: Tensor, blocks_N: Tensor) -> None:
        self.rows.append(features_ND)
        self.row_blocks.append(blocks_N)
        threshold = FOLD_ROWS * self.num_blocks
        if sum(map(len, self.rows)) >= threshold:
            rows, blocks = self._waiting()
            whole = len(rows) // threshold * threshold
            for start in range(0, whole, threshold):
                self._fold(self.moments, rows[start : start + threshold], blocks[start : start + threshold])
            self.rows, self.row_blocks = [rows[whole:]], [blocks[whole:]]

    def statistics(self) -> Sequence[GaussianStatistics]:
        """Statistics of each block."""
        moments = self.moments.clone()
        self._fold(moments, *self._waiting())
        return [_unpack(values) for values in moments.cpu().numpy()]

    def estimates(self) -> dict[str, Estimate]:
        raise NotImplementedError("these are moments; FrechetDistance is the metric over them")

    def _waiting(self) -> tuple[Tensor, Tensor]:
        if isinstance(self.rows, Tensor):  # after a reduction over processes
            return self.rows, self.row_blocks
        if not self.rows:
            return torch.empty(0, self.num_features), torch.empty(0, dtype=torch.int64)
        return torch.cat(self.rows), torch.cat(self.row_blocks)

    def _fold(self, moments: Tensor, rows: Tensor, blocks: Tensor) -> None:
        for block in range(self.num_blocks):
            features = rows[blocks == block].numpy()
            if len(features):
                merged = merge(_unpack(moments[block].cpu().numpy()), GaussianStatistics.of(features))
                moments[block] = torch.from_numpy(_pack(merged)).to(moments.device)


class FrechetDistance(GaussianMetric):
    """Fréchet distance to the reference (see `evaluation.frechet`); FID if the features are those of FID's Inception."""

    measures = (SAMPLES, RECONSTRUCTIONS, HOLDOUT)
    needs_reference = True
    higher_is_better = False

    def estimates(self) -> dict[str, Estimate]:
        """The distance, its standard error and the value without the bias of order 1/n."""
        assert self.reference is not None, "a distance needs a reference"
        return {"": frechet_estimate(self.statistics(), self.reference.gaussian, DISTANCE_THREADS)}


def _pack(statistics: GaussianStatistics) -> np.ndarray:
    n = np.full((1, len(statistics.mean)), float(statistics.n))
    return np.concatenate([n, statistics.mean[None], statistics.m2])


def _unpack(values: np.ndarray) -> GaussianStatistics:
    return GaussianStatistics(int(values[0, 0]), values[1], values[2:])


def _merge_packed(stacked: Tensor) -> Tensor:
    """Moments (P, K, d + 2, d) of P processes to those of all, block by block."""
    blocks = [merge_all(map(_unpack, values)) for values in stacked.cpu().numpy().swapaxes(0, 1)]
    return torch.from_numpy(np.stack([_pack(block) for block in blocks])).to(stacked.device)
