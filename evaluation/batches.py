"""Batches of one fixed shape: a network that never sees another gives an image the same numbers wherever it stands."""

from collections.abc import Iterator

import numpy as np

BATCH_SIZE = 32


def padded_batches(*arrays: np.ndarray, size: int | None = None) -> Iterator[tuple[int, tuple[np.ndarray, ...]]]:
    """Rows of arrays (n, …) in batches of `size` (BATCH_SIZE if not given), the last one filled up with zeros: how many
    rows are real, and the batch of each array."""
    size = size or BATCH_SIZE
    for start in range(0, len(arrays[0]), size):
        n = min(size, len(arrays[0]) - start)
        batch = tuple(np.zeros((size, *array.shape[1:]), array.dtype) for array in arrays)
        for padded, array in zip(batch, arrays, strict=True):
            padded[:n] = array[start : start + n]
        yield n, batch
