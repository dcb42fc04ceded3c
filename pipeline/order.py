"""Sample order as a pure function of (dataset root hash, seed, global batch size, step).

An epoch is a keyed permutation of the images, computed point by point (a Feistel network with cycle walking: Luby and Rackoff 1988,
Black and Rogaway 2002), so no permutation is stored and any step is as cheap as the first. The view of an image and its condition
draw are hashes of (key, epoch, image). Nothing depends on the number of ranks.
"""

import hashlib
from dataclasses import dataclass

import numpy as np

from stages.hashing import hash64, uniform

NUM_ROUNDS = 6
SAMPLER_VERSION = 1
_PERMUTATION, _VIEW, _CONDITION = range(3)  # keeps the three uses of one key apart


def permute(positions: np.ndarray, size: int, key: int) -> np.ndarray:
    """A bijection of range(size) chosen by `key`, evaluated at int64 positions in [0, size)."""
    half_bits = max(1, (max(size - 1, 1).bit_length() + 1) // 2)
    values = positions.astype(np.uint64)
    walking = np.ones(len(values), dtype=bool)
    while walking.any():  # the network permutes a power of four at most 4 times too large; walk on until inside
        values[walking] = _feistel(values[walking], half_bits, key)
        walking = values >= np.uint64(size)
    return values.astype(np.int64)


def _feistel(values: np.ndarray, half_bits: int, key: int) -> np.ndarray:
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = values >> shift, values & mask
    for round_number in range(NUM_ROUNDS):
        left, right = right, left ^ (hash64(key, round_number, right) & mask)
    return (left << shift) | right


@dataclass(frozen=True)
class OrderedBatch:
    """Rows of one global batch, int64 (GB,), and which of them count; the last batch of an epoch is masked, not dropped."""

    rows: np.ndarray
    valid: np.ndarray


class SampleOrder:
    """The order in which a run consumes a code dataset: each image once per epoch, in one of its views.

    Args:
        num_images: images in the dataset; row = image * num_views + view.
        num_views: views per image.
        seed: of the run.
        global_batch_size: rows per step over all ranks.
        root_hash: of the dataset, so that another dataset has another order.
    """

    def __init__(self, *, num_images: int, num_views: int, seed: int, global_batch_size: int, root_hash: str):
        self.num_images, self.num_views, self.global_batch_size = num_images, num_views, global_batch_size
        text = f"{SAMPLER_VERSION}:{root_hash}:{seed}"
        self._key = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.num_images // self.global_batch_size)

    def batch(self, step: int) -> OrderedBatch:
        """The global batch of a step (counted from 0 over all epochs). Masked entries are row 0."""
        images, valid, epoch = self._images(step)
        views = (hash64(self._key, _VIEW, epoch, images) % np.uint64(self.num_views)).astype(np.int64)
        return OrderedBatch(np.where(valid, images * self.num_views + views, 0), valid)

    def draws(self, step: int) -> np.ndarray:
        """One number in [0, 1) per entry of the step's batch, float64 (GB,), for dropping conditions."""
        images, _, epoch = self._images(step)
        return uniform(hash64(self._key, _CONDITION, epoch, images))

    def num_valid(self, step: int) -> int:
        """Entries of the step's batch that count."""
        start = step % self.steps_per_epoch * self.global_batch_size
        return min(self.global_batch_size, self.num_images - start)

    def _images(self, step: int) -> tuple[np.ndarray, np.ndarray, int]:
        epoch, index = divmod(step, self.steps_per_epoch)
        positions = index * self.global_batch_size + np.arange(self.global_batch_size)
        valid = positions < self.num_images
        key = int(hash64(self._key, _PERMUTATION, epoch)[0])
        return permute(np.where(valid, positions, 0), self.num_images, key), valid, epoch


def slice_for_rank(global_batch_size: int, rank: int, world_size: int) -> slice:
    """The contiguous part of a global batch that one rank takes; parts differ by at most one."""
    return slice(global_batch_size * rank // world_size, global_batch_size * (rank + 1) // world_size)


def rows_digest(step: int, positions: np.ndarray, rows: np.ndarray) -> int:
    """Digest of the rows at these positions of a step: a sum modulo 2^64, so digests of ranks add up to the batch's."""
    with np.errstate(over="ignore"):
        return int(hash64(step, positions, rows).sum(dtype=np.uint64)) if len(rows) else 0
