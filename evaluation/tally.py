"""What an evaluation adds up while items come back: one tally for samples, one for held-out images."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from evaluation.estimates import Estimate, blocked_mean, leave_one_out, perplexity, usage
from evaluation.grids import grid_positions, pairs_png, tiles_png
from evaluation.label_metrics import mean_iou
from evaluation.metrics import FeatureKey, MetricPlan
from evaluation.reference import StoredReference
from evaluation.set_tally import Features, SetTally
from pipeline.grids import default_columns
from stages.errors import TesseraError

Item = tuple[int, int]


@dataclass(frozen=True, eq=False)
class RealImages:
    """What one item of held-out images yields; n is the number of them that can be used.

    Attributes:
        is_usable: bool (m,), which of the m asked for can be used.
        features: float32 (n, d) by key.
        reconstruction_features: the same of the tokenizer's reconstructions.
        pixels: float64 (n,) by name of the metric, of the reconstructions.
        overlaps: int64 (n, num_labels, 2) of maps of labels, see `evaluation.label_metrics`; None where that is not measured.
        tiles: by position in the item, for those asked for: image and reconstruction, uint8 (2, H, W, C).
    """

    is_usable: np.ndarray
    features: Features
    reconstruction_features: Features
    pixels: Mapping[str, np.ndarray]
    tiles: dict[int, np.ndarray]
    overlaps: np.ndarray | None = None


class _Grid:
    """The tiles of one or several grids over the same positions."""

    def __init__(self, labels: np.ndarray, num_images: int):
        self.positions, self.columns = grid_positions(labels, num_images)
        self._labels = labels
        self._wanted = np.sort(self.positions)
        self.tiles: dict[int, np.ndarray] = {}

    def tiles_in(self, item: Item) -> list[int]:
        first, last = np.searchsorted(self._wanted, item)
        return [int(position) - item[0] for position in self._wanted[first:last]]

    def layout(self) -> dict[str, Any]:
        """Where each tile stands: `num_columns`, and the class of every tile row by row (-1 where there is none)."""
        columns = self.columns or default_columns(len(self.positions))
        return {"num_columns": columns, "labels": self.labels_at(self.positions)}

    def labels_at(self, positions: np.ndarray) -> list[int]:
        return self._labels[positions].tolist()

    def add(self, item: Item, tiles: dict[int, np.ndarray]) -> None:
        self.tiles.update({item[0] + position: tile for position, tile in tiles.items()})


class SampleTally:
    """Metrics and grid of the samples.

    Args:
        labels: int64 (n,), classes of the samples, -1 without classes.
        metrics: fed with their features.
        num_grid_images: most images in the grid.
    """

    def __init__(self, labels: np.ndarray, metrics: SetTally, num_grid_images: int):
        self._grid = _Grid(labels, num_grid_images)
        self._pairs: dict[int, np.ndarray] = {}
        self.metrics = metrics

    def tiles_in(self, item: Item) -> list[int]:
        """Positions within an item of the images that the grid shows."""
        return self._grid.tiles_in(item)

    def add(
        self, item: Item, features: Features, tiles: dict[int, np.ndarray], codes: np.ndarray | None = None
    ) -> None:
        """Adds the features float32 (n, d) by key, the tiles and, where they are measured, codes int64 (n, L) of one item."""
        self.metrics.add(np.arange(*item), features, codes)
        self._grid.add(item, tiles)

    def nearest_training(self, references: Mapping[FeatureKey, StoredReference]) -> dict[int, int]:
        """By position in the grid, the position in the listing of the training image that is nearest, of samples that
        are compared one by one; empty where memorisation is not measured."""
        found = self.metrics.nearest_training()
        if found is None:
            return {}
        planned, metric = found
        stored = references[planned.features]
        assert stored.kept is not None
        metric.reference = stored.reference
        nearest = stored.kept[metric.nearest()[1]]
        rows = self.metrics.paired_rows(self._grid.positions)
        return {int(p): int(nearest[row]) for p, row in zip(self._grid.positions, rows, strict=True) if row >= 0}

    def add_neighbours(self, neighbours: Mapping[int, np.ndarray | None]) -> None:
        """Adds a grid of the samples at these positions, each with another image to the right, white for None."""
        tiles = self._grid.tiles
        self._pairs = {
            p: np.stack([tiles[p], np.full_like(tiles[p], 255) if n is None else n]) for p, n in neighbours.items()
        }

    def layouts(self) -> dict[str, dict[str, Any]]:
        """Where the tiles of each grid stand."""
        layouts = {"samples": self._grid.layout()}
        if self._pairs:
            labels = self._grid.labels_at(np.repeat(list(self._pairs), 2))
            layouts["neighbours"] = {"num_columns": 2 * self._pair_columns(), "labels": labels}
        return layouts

    def grids(self) -> dict[str, bytes]:
        """The grid of samples, and that of their neighbours if there are any, as PNG."""
        grids = {"samples": tiles_png(self._grid.tiles, self._grid.positions, self._grid.columns)}
        if self._pairs:
            grids["neighbours"] = pairs_png(self._pairs, np.array(list(self._pairs)), self._pair_columns())
        return grids

    def _pair_columns(self) -> int:
        """Pairs in a row: classes keep their rows where every sample of the grid has its pair."""
        if self._grid.columns and len(self._pairs) == len(self._grid.positions):
            return self._grid.columns
        return max(1, default_columns(len(self._pairs)) // 2)


class HoldoutTally:
    """Metrics, pixel errors, codes and likelihoods of held-out images and their reconstructions.

    Args:
        labels: int64 (m,), classes of the images, -1 where there is none.
        real, reconstructed: metrics, fed with the features of images and reconstructions.
        plan: says what else is measured.
        codebook_size: entries of the tokenizer's codebook.
        num_grid_images: most images in each grid.
    """

    def __init__(
        self,
        labels: np.ndarray,
        real: SetTally,
        reconstructed: SetTally,
        plan: MetricPlan,
        codebook_size: int,
        num_grid_images: int,
    ):
        self._grid = _Grid(labels, num_grid_images)
        self._counts = np.zeros((real.num_blocks, codebook_size), np.int64)
        self._pixels: dict[str, list[np.ndarray]] = {name: [] for name in plan.pixels}
        self._nll: list[np.ndarray] = []
        self._blocks: list[np.ndarray] = []
        self._overlaps: np.ndarray | int = 0
        self._plan = plan
        self._num_images = len(labels)
        self.real = real
        self.reconstructed = reconstructed
        self.num_unusable = 0

    def tiles_in(self, item: Item) -> list[int]:
        """Positions within an item of the images that the grids show."""
        return self._grid.tiles_in(item)

    def add(self, item: Item, images: RealImages, codes: np.ndarray, nll: np.ndarray | None = None) -> None:
        """Adds one item: what its images yield, codes int64 (n, L), and negative log-likelihoods float64 (n,) in nats
        where they are measured."""
        indices = np.arange(*item)[images.is_usable]
        self.real.add(indices, images.features, codes)
        self.reconstructed.add(indices, images.reconstruction_features)
        blocks = self.real.blocks[indices]
        self._blocks.append(blocks)
        np.add.at(self._counts, (blocks[:, None], codes), 1)
        if images.overlaps is not None:
            self._overlaps += np.stack([images.overlaps[blocks == block].sum(axis=0) for block in range(self.real.num_blocks)])
        for name, values in images.pixels.items():
            self._pixels[name].append(values)
        if nll is not None:
            self._nll.append(nll)
        self._grid.add(item, images.tiles)
        self.num_unusable += int(np.sum(~images.is_usable))

    def check(self, minimum: int) -> None:
        """Raises TesseraError when fewer than `minimum` images can be used."""
        num_usable = self._num_images - self.num_unusable
        if num_usable < minimum:
            raise TesseraError(
                f"{num_usable} of {self._num_images} held-out images can be used, but the error bars need "
                f"{minimum}. Check the source."
            )

    def estimates(self, num_codes: int) -> dict[str, Estimate]:
        """Metrics that need no features.

        psnr in dB; pixel_accuracy, mean_iou and codebook_usage in [0, 1]; codebook_perplexity in codes; validation_nll in nats per
        code; validation_bits_per_image in bits.
        """

        def mean(parts: Sequence[np.ndarray], unit: float = 1.0) -> Estimate:
            return blocked_mean(np.concatenate(parts) / unit, np.concatenate(self._blocks), self.real.num_blocks)

        found = {name: mean(values) for name, values in self._pixels.items()}
        num_usable = self._num_images - self.num_unusable
        if self._plan.has_mean_iou:
            found["mean_iou"] = leave_one_out(mean_iou, np.asarray(self._overlaps), num_usable)
        if self._plan.has_codebook:
            found["codebook_usage"] = Estimate(usage(self._counts.sum(axis=0)), num_usable)
            found["codebook_perplexity"] = leave_one_out(perplexity, self._counts, num_usable)
        if self._plan.has_likelihood:
            found["validation_nll"] = mean(self._nll, num_codes)
            found["validation_bits_per_image"] = mean(self._nll, math.log(2.0))
        return found

    def side_by_side(self) -> bytes:
        """The grid of real images, each with its reconstruction to the right, as PNG."""
        return pairs_png(self._grid.tiles, self._grid.positions, max(1, (self._grid.columns or 8) // 2))

    def layouts(self) -> dict[str, dict[str, Any]]:
        """Where the tiles of each grid stand."""
        return {name: self._grid.layout() for name in ("real", "reconstructions")}

    def grids(self) -> dict[str, bytes]:
        """The grids of real images and of their reconstructions, image by image in the same places."""
        names: Sequence[str] = ("real", "reconstructions")
        return {
            name: tiles_png(
                {p: pair[i] for p, pair in self._grid.tiles.items()}, self._grid.positions, self._grid.columns
            )
            for i, name in enumerate(names)
        }
