"""Sample order as a pure function of (dataset root hash, seed, global batch size, step).

An epoch is a keyed permutation of the images, computed point by point (a Feistel network with cycle walking: Luby and Rackoff 1988,
Black and Rogaway 2002), so no permutation is stored and any step is as cheap as the first. The view of an image and its condition
draw are hashes of (key, epoch, image). Nothing depends on the number of ranks.

A dataset larger than the memory near it is read in windows: blocks of neighbouring images are permuted, and the images of each
few consecutive blocks are permuted together. That is still every image once per epoch, and still nothing but the step.
"""

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numba import njit

from stages.hashing import hash64

NUM_ROUNDS = 6
SAMPLER_VERSION = 2


@dataclass(frozen=True)
class OrderedBatch:
    """One global batch; the last of an epoch is masked, not dropped.

    Attributes:
        rows: int64 (GB,); row 0 where masked.
        valid: bool (GB,), which entries count.
        draws: float64 (GB,) in [0, 1), one number per entry for dropping its condition.
    """

    rows: np.ndarray
    valid: np.ndarray
    draws: np.ndarray


@dataclass(frozen=True)
class Window:
    """How far an order reaches at a time: `num_blocks` blocks of `images_per_block` neighbouring images."""

    images_per_block: int
    num_blocks: int


class SampleOrder:
    """The order in which a run consumes a code dataset: each image once per epoch, in one of its views.

    Args:
        num_images: images in the dataset; row = image * num_views + view.
        num_views: views per image.
        seed: of the run.
        global_batch_size: rows per step over all ranks.
        root_hash: of the dataset, so that another dataset has another order.
        window: reads the dataset window by window; None shuffles it as a whole.
    """

    def __init__(
        self,
        *,
        num_images: int,
        num_views: int,
        seed: int,
        global_batch_size: int,
        root_hash: str,
        window: Window | None = None,
    ):
        self.num_images, self.num_views, self.global_batch_size = num_images, num_views, global_batch_size
        self.window = window
        text = f"{SAMPLER_VERSION}:{root_hash}:{seed}"
        self._key = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
        self._epoch_keys = functools.lru_cache(maxsize=2)(self._make_epoch_keys)

    @functools.cached_property
    def steps_per_epoch(self) -> int:
        return -(-self.num_images // self.global_batch_size)

    def batch(self, index: int) -> OrderedBatch:
        """The global batch of an index, counted from 0 over all epochs."""
        epoch, place = divmod(index, self.steps_per_epoch)
        positions = place * self.global_batch_size + np.arange(self.global_batch_size)
        valid = positions < self.num_images
        keys = self._epoch_keys(epoch)
        images = self._images(keys, np.where(valid, positions, 0))
        views, draws = _views_and_draws(images, keys.view, keys.condition, self.num_views)
        return OrderedBatch(np.where(valid, images * self.num_views + views, 0), valid, draws)

    def num_valid(self, index: int) -> int:
        """Entries of that batch that count."""
        start = index % self.steps_per_epoch * self.global_batch_size
        return min(self.global_batch_size, self.num_images - start)

    def _images(self, keys: "_EpochKeys", positions: np.ndarray) -> np.ndarray:
        if self.window is None:
            return _permute_all(positions, self.num_images, keys.rounds)
        size, count = self.window.images_per_block, self.window.num_blocks
        return _windowed(positions, self.num_images, size, count, keys.block_rounds, keys.permutation)

    def _make_epoch_keys(self, epoch: int) -> "_EpochKeys":
        permutation, view, condition, blocks = (int(hash64(self._key, use, epoch)[0]) for use in range(4))
        return _EpochKeys(
            permutation=np.uint64(permutation),
            rounds=round_keys(permutation),
            block_rounds=round_keys(blocks),
            view=np.uint64(view),
            condition=np.uint64(condition),
        )


@dataclass(frozen=True, kw_only=True)
class _EpochKeys:
    """One key of an epoch per use, so that nothing of one follows from another."""

    permutation: np.uint64
    rounds: np.ndarray
    block_rounds: np.ndarray
    view: np.uint64
    condition: np.uint64


def batch_index(step: int, skipped: Sequence[tuple[int, int]]) -> int:
    """Which global batch a step consumes when some are left out.

    Args:
        step: counted from 0 over all epochs.
        skipped: half-open ranges of batches, disjoint and in order.
    """
    index = step
    for start, stop in skipped:
        if index >= start:
            index += stop - start
    return index


def skip_batches(skipped: Sequence[tuple[int, int]], start: int, stop: int) -> tuple[tuple[int, int], ...]:
    """`skipped` with the batches [start, stop) left out as well: disjoint ranges in order."""
    merged: list[tuple[int, int]] = []
    for first, last in sorted([*skipped, (start, stop)]):
        if merged and first <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(last, merged[-1][1]))
        else:
            merged.append((first, last))
    return tuple(merged)


def slice_for_rank(global_batch_size: int, rank: int, world_size: int) -> slice:
    """The contiguous part of a global batch that one rank takes; parts differ by at most one."""
    return slice(global_batch_size * rank // world_size, global_batch_size * (rank + 1) // world_size)


def rows_digest(index: int, positions: np.ndarray, rows: np.ndarray) -> int:
    """Digest of the rows at these positions of a global batch: a sum modulo 2^64, so digests of ranks add up to the batch's."""
    with np.errstate(over="ignore"):
        return int(hash64(index, positions, rows).sum(dtype=np.uint64)) if len(rows) else 0


def permute(positions: np.ndarray, size: int, key: int) -> np.ndarray:
    """A bijection of range(size) chosen by `key`, evaluated at int64 positions in [0, size)."""
    return _permute_all(positions, size, round_keys(key))


def round_keys(key: int) -> np.ndarray:
    """One uint64 per round of the Feistel network: `hash64(key, round)`, to be mixed with the half that is hashed."""
    return hash64(key, np.arange(NUM_ROUNDS))


@njit(nogil=True, cache=True)
def _mix(value: np.uint64) -> np.uint64:
    """`stages.hashing.mix` of one uint64."""
    z = value + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@njit(nogil=True, cache=True)
def _num_bits(size: int) -> int:
    """Bits of the smallest network that reaches `size`: it permutes a power of two, less than twice too large."""
    bits = 2
    while (size - 1) >> bits > 0:
        bits += 1
    return bits


@njit(nogil=True, cache=True)
def _permute(position: int, size: int, keys: np.ndarray) -> np.int64:
    """Where `permute` takes one position: through the network until the result is inside the range.

    The halves of the network differ by one bit if the number of bits is odd; they trade places after every round, and an even
    number of rounds brings them back.
    """
    bits = _num_bits(size)
    value, low = np.uint64(position), np.uint64(bits // 2)
    high = np.uint64(bits) - low
    while True:
        left, right = value >> low, value & ((np.uint64(1) << low) - np.uint64(1))
        width, other = high, low
        for key in keys:
            left, right = right, left ^ (_mix(key ^ right) & ((np.uint64(1) << width) - np.uint64(1)))
            width, other = other, width
        value = (left << low) | right
        if value < np.uint64(size):
            return np.int64(value)


@njit(nogil=True, cache=True)
def _position_of(image: int, size: int, keys: np.ndarray) -> np.int64:
    """The inverse of `_permute`."""
    bits = _num_bits(size)
    value, low = np.uint64(image), np.uint64(bits // 2)
    high = np.uint64(bits) - low
    while True:
        left, right = value >> low, value & ((np.uint64(1) << low) - np.uint64(1))
        width, other = low, high
        for key in keys[::-1]:
            left, right = right ^ (_mix(key ^ left) & ((np.uint64(1) << width) - np.uint64(1))), left
            width, other = other, width
        value = (left << low) | right
        if value < np.uint64(size):
            return np.int64(value)


@njit(nogil=True, cache=True)
def _permute_all(positions: np.ndarray, size: int, keys: np.ndarray) -> np.ndarray:
    images = np.empty(len(positions), np.int64)
    for i in range(len(positions)):
        images[i] = _permute(positions[i], size, keys)
    return images


@njit(nogil=True, cache=True)
def _views_and_draws(
    images: np.ndarray, view_key: np.uint64, draw_key: np.uint64, num_views: int
) -> tuple[np.ndarray, np.ndarray]:
    """`hash64(…, image)` of the two uses, as a view in [0, num_views) and as a number in [0, 1)."""
    views, draws = np.empty(len(images), np.int64), np.empty(len(images), np.float64)
    for i in range(len(images)):
        image = np.uint64(images[i])
        views[i] = _mix(view_key ^ image) % np.uint64(num_views)
        draws[i] = np.float64(_mix(draw_key ^ image) >> np.uint64(11)) * 2.0**-53
    return views, draws


@njit(nogil=True, cache=True)
def _windowed(
    positions: np.ndarray,
    num_images: int,
    images_per_block: int,
    blocks_per_window: int,
    block_keys: np.ndarray,
    image_key: np.uint64,
) -> np.ndarray:
    """Images at positions of an epoch that is read window by window.

    The last block of the dataset may be short. It lies anywhere in the sequence of blocks; later windows start that much
    earlier, and within its window it counts as the last block.
    """
    num_blocks = -(-num_images // images_per_block)
    missing = num_blocks * images_per_block - num_images
    short_place = _position_of(num_blocks - 1, num_blocks, block_keys)
    short_window = short_place // blocks_per_window
    full = images_per_block * blocks_per_window
    images, keys, keys_of = np.empty(len(positions), np.int64), np.empty(len(block_keys), np.uint64), -1
    for i in range(len(positions)):
        window = positions[i] // full
        if window >= short_window:
            window = max(short_window, (positions[i] + missing) // full)
        if window != keys_of:
            seed = _mix(image_key ^ np.uint64(window))
            for r in range(len(keys)):
                keys[r] = _mix(seed ^ np.uint64(r))
            keys_of = window
        first = window * blocks_per_window
        blocks_here = min(blocks_per_window, num_blocks - first)
        start, size = window * full, blocks_here * images_per_block
        if window > short_window:
            start -= missing
        if window == short_window:
            size -= missing
        inside = _permute(positions[i] - start, size, keys)
        place = first + inside // images_per_block
        if window == short_window:
            if place == first + blocks_here - 1:
                place = short_place
            elif place >= short_place:
                place += 1
        images[i] = _permute(place, num_blocks, block_keys) * images_per_block + inside % images_per_block
    return images
