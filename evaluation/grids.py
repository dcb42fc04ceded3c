"""Which images stand in the grids of a record, and where."""

import numpy as np

from pipeline.grids import grid_png


def grid_positions(labels: np.ndarray, num_images: int) -> tuple[np.ndarray, int | None]:
    """Positions of the images of a grid, int64 (k,), k <= num_images, and the number of columns (None: let the grid
    choose).

    With a few classes, one row per class in order of class; with more classes than places, one image of each of the first
    ones; without classes, the first images. Fixed by the labels, so that the grids of two evaluations show the same samples.

    Args:
        labels: int64 (n,), -1 where there is none.
        num_images: most images in the grid.
    """
    classes, firsts, counts = np.unique(labels, return_index=True, return_counts=True)
    if len(classes) < 2:
        return np.arange(min(num_images, len(labels))), None
    if len(classes) > num_images:
        return firsts[:num_images], None
    columns = min(num_images // len(classes), int(counts.min()))
    return np.concatenate([np.flatnonzero(labels == label)[:columns] for label in classes]), columns


def pairs_png(pairs: dict[int, np.ndarray], positions: np.ndarray, columns: int) -> bytes:
    """The grid of pairs of tiles, uint8 (2, H, W, C) by position, side by side, as PNG; else like `tiles_png`."""
    return tiles_png(
        {p: np.concatenate([left, right], axis=1) for p, (left, right) in pairs.items()}, positions, columns
    )


def tiles_png(tiles: dict[int, np.ndarray], positions: np.ndarray, columns: int | None) -> bytes:
    """The grid as PNG: tiles uint8 (H, W, C) by position, in the order of `positions`; a missing one stays white."""
    blank = np.full_like(next(iter(tiles.values())), 255)
    return grid_png(np.stack([tiles.get(int(position), blank) for position in positions]), columns)
