"""The Inception Score (Salimans et al. 2016)."""

from typing import Any

import torch
from torch import Tensor

from evaluation.estimates import Estimate, jackknife
from evaluation.set_metric import HOLDOUT, RECONSTRUCTIONS, SAMPLES, SetMetric


class InceptionScore(SetMetric):
    """exp of the mean Kullback-Leibler divergence between an image's class probabilities and their mean.

    Over all images at once, which the customary mean over ten parts falls below for few images: `bias_corrected` removes
    that. Features are logits (n, 1008). The state is sums per block, so memory does not grow.
    """

    measures = (SAMPLES, RECONSTRUCTIONS, HOLDOUT)
    needs_reference = False
    higher_is_better = True
    probability_sums: Tensor
    negative_entropy_sums: Tensor
    counts: Tensor

    def __init__(self, num_features: int, num_blocks: int = 1, **kwargs: Any):
        super().__init__(num_features, num_blocks, **kwargs)
        for name, shape in (
            ("probability_sums", (num_blocks, num_features)),
            ("negative_entropy_sums", (num_blocks,)),
            ("counts", (num_blocks,)),
        ):
            self.add_state(name, default=torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    def add(self, features_ND: Tensor, blocks_N: Tensor) -> None:
        p = features_ND.double().softmax(1)
        self.probability_sums.index_add_(0, blocks_N, p)
        # xlogy: a probability that underflows to 0 adds 0, not NaN.
        self.negative_entropy_sums.index_add_(0, blocks_N, torch.xlogy(p, p).sum(1))
        self.counts.index_add_(0, blocks_N, torch.ones(len(p), dtype=torch.float64))

    def estimates(self) -> dict[str, Estimate]:
        def score(kept: Tensor) -> float:
            n = self.counts[kept].sum()
            mean = self.probability_sums[kept].sum(0) / n
            return float(torch.exp(self.negative_entropy_sums[kept].sum() / n - torch.xlogy(mean, mean).sum()))

        blocks = torch.arange(self.num_blocks)
        without = [score(blocks != block) for block in blocks] if self.num_blocks > 1 else []
        return {"": jackknife(score(blocks >= 0), without, int(self.counts.sum()))}
