"""The metrics of one set of images, fed item by item in the order of the indices."""

import dataclasses
from collections.abc import Mapping

import numpy as np
import torch

from evaluation.estimates import Estimate, assign_blocks, fair_choice
from evaluation.metrics import FeatureKey, MetricPlan, PlannedSetMetric
from evaluation.neighbour_metrics import NearestTraining, copied_share
from evaluation.set_metric import ReferenceSet, SetMetric

Features = Mapping[FeatureKey, np.ndarray]


class SetTally:
    """All metrics of one set.

    Args:
        image_set: samples, reconstructions or holdout.
        plan: names the metrics.
        widths: of the features, by key.
        num_images: images that will come, usable or not.
        num_blocks: blocks of the jackknife.
        pairwise_limit: most images for metrics that compare images one by one.
    """

    def __init__(
        self,
        image_set: str,
        plan: MetricPlan,
        widths: Mapping[FeatureKey, int],
        num_images: int,
        num_blocks: int,
        pairwise_limit: int,
    ):
        self.image_set = image_set
        self.num_blocks = num_blocks
        self.metrics: list[tuple[PlannedSetMetric, SetMetric]] = [
            (planned, planned.kind.cls(widths[planned.features], num_blocks=num_blocks))
            for planned in plan.of_set(image_set)
        ]
        self.blocks = assign_blocks(num_images, num_blocks)
        self._is_paired = fair_choice(num_images, pairwise_limit)
        self._has_code_matches = plan.has_code_matches
        self._codes: list[np.ndarray] = []

    def add(self, indices: np.ndarray, features: Features, codes: np.ndarray | None = None) -> None:
        """Adds features float32 (n, d) and codes int64 (n, L) of the images with these indices, int64 (n,)."""
        blocks, is_paired = self.blocks[indices], self._is_paired[indices]
        for planned, metric in self.metrics:
            values, taken = features[planned.features], blocks
            if metric.is_pairwise:
                values, taken = values[is_paired], blocks[is_paired]
            # Copied: arrays that come through Ray would keep its object store from freeing them.
            metric.update(torch.tensor(values), torch.tensor(taken))
        if self._has_code_matches and codes is not None:
            self._codes.append(codes[is_paired].astype(np.uint16))

    def codes(self) -> np.ndarray:
        """Codes of the images that are compared one by one, uint16 (n, L), if any were added."""
        return np.concatenate(self._codes)

    def paired_rows(self, indices: np.ndarray) -> np.ndarray:
        """Which rows these images are in metrics that compare images one by one, int64 (n,), -1 where they are none.

        It holds for a set of which every image could be used.
        """
        return np.where(self._is_paired, np.cumsum(self._is_paired) - 1, -1)[indices]

    def nearest_training(self) -> tuple[PlannedSetMetric, NearestTraining] | None:
        """The first metric that looks for memorisation."""
        for planned, metric in self.metrics:
            if isinstance(metric, NearestTraining):
                return planned, metric
        return None

    def estimates(self, references: Mapping[FeatureKey, ReferenceSet]) -> dict[str, Estimate]:
        """Every metric under its name in records."""
        found = {}
        for planned, metric in self.metrics:
            metric.reference = references.get(planned.features)
            for part, estimate in metric.estimates().items():
                measured = dataclasses.replace(estimate, features="/".join(planned.features))
                found[planned.record_name(self.image_set, part)] = measured
        return found


def memorisation_estimates(samples: SetTally, holdout: SetTally) -> dict[str, Estimate]:
    """`copied_share` for each extractor that looks for memorisation; their references are set."""
    found = {}
    for planned, metric in samples.metrics:
        if isinstance(metric, NearestTraining):
            other = next(m for p, m in holdout.metrics if p == planned)
            assert isinstance(other, NearestTraining)
            share = dataclasses.replace(copied_share(metric, other), features="/".join(planned.features))
            found["copied_share" + planned.suffix] = share
    return found
