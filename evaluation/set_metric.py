"""What metrics of a set of images have in common: torchmetrics Metrics over features, with error bars from blocks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

from evaluation.estimates import Estimate
from evaluation.frechet import Reference

SAMPLES, RECONSTRUCTIONS, HOLDOUT = "samples", "reconstructions", "holdout"


@dataclass(frozen=True, eq=False)
class ReferenceSet:
    """What a set is measured against: statistics of one output of an extractor, and perhaps features themselves.

    Attributes:
        gaussian: mean and covariance of all reference images.
        features: float32 (m, d) of some of them, for metrics that compare images one by one.
    """

    gaussian: Reference
    features: np.ndarray | None = None


class SetMetric(Metric):
    """A metric of one set of images. State merges exactly over processes, in any order that keeps the rows' order.

    Args:
        num_features: width d of the features.
        num_blocks: K, blocks of the jackknife; with 1 there are no error bars.
        reference: what to measure against; may be set before `estimates` instead.
        extractor: maps uint8 images (n, H, W, C) to float features (n, d); without it `update` takes features.

    Attributes:
        measures: the sets it is meaningful for.
        parts: names of its values in `estimates`.
        num_neighbours: of each image that it looks for; it needs more images than that.
        is_pairwise: compares images one by one, so that its cost grows with the square of their number.
        needs_reference: cannot be computed without one.
    """

    measures: ClassVar[Sequence[str]] = (SAMPLES, HOLDOUT)
    parts: ClassVar[Sequence[str]] = ("",)
    num_neighbours: ClassVar[int] = 0
    is_pairwise: ClassVar[bool] = False
    needs_reference: ClassVar[bool] = True
    is_differentiable = False
    full_state_update = False

    def __init__(
        self,
        num_features: int,
        num_blocks: int = 1,
        reference: ReferenceSet | None = None,
        extractor: Callable[[np.ndarray], np.ndarray] | None = None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.num_features = num_features
        self.num_blocks = num_blocks
        self.reference = reference
        self.extractor = extractor

    def update(self, inputs: Tensor, blocks: Tensor | None = None) -> None:
        """Adds features float (n, d), or images uint8 (n, H, W, C) when there is an extractor; row i to block
        blocks[i] (int64), or all to the first."""
        if self.extractor is not None:
            inputs = torch.from_numpy(self.extractor(inputs.cpu().numpy()))
        self.add(inputs.detach().cpu(), torch.zeros(len(inputs), dtype=torch.int64) if blocks is None else blocks.cpu())

    def add(self, features_ND: Tensor, blocks_N: Tensor) -> None:
        """Takes features and their blocks into the state."""
        raise NotImplementedError

    def estimates(self) -> dict[str, Estimate]:
        """Values with error bars. The name is empty where there is one, which is then named by the metric's own."""
        raise NotImplementedError

    def compute(self) -> Tensor | dict[str, Tensor]:
        """The plain values, float64 scalars: one, or several by name."""
        values = {name: torch.tensor(e.value, dtype=torch.float64) for name, e in self.estimates().items()}
        return values[""] if "" in values else values


class FeatureMetric(SetMetric):
    """A metric that keeps every feature it is given."""

    rows: list[Tensor]
    row_blocks: list[Tensor]

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.add_state("rows", default=[], dist_reduce_fx="cat")
        self.add_state("row_blocks", default=[], dist_reduce_fx="cat")

    def add(self, features_ND: Tensor, blocks_N: Tensor) -> None:
        self.rows.append(features_ND)
        self.row_blocks.append(blocks_N)

    def kept(self) -> tuple[Tensor, Tensor]:
        """All features float64 (n, d) and their blocks int64 (n,)."""
        rows, blocks = (value if isinstance(value, Tensor) else torch.cat(value) for value in (self.rows, self.row_blocks))
        return rows.double(), blocks

    def reference_features(self) -> Tensor:
        """Features of the reference, float64 (m, d)."""
        assert self.reference is not None and self.reference.features is not None, "this metric needs features"
        return torch.from_numpy(self.reference.features).double()
