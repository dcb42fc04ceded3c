"""The order in which a tokenizer is trained on images: a pure function of (image list, seed, global batch size, batch).

As in `pipeline.order`, an epoch is a keyed permutation and nothing depends on the number of ranks. Epochs follow one another without
a gap, so a batch may end one and begin the next: each image comes once per epoch, and no batch is short.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from pipeline.order import permute
from pipeline.views import Crop
from stages.hashing import hash64, uniform

IMAGE_ORDER_VERSION = 1
PERMUTATION, AUGMENTATION, SUBSTITUTE = range(3)  # what hashes are for


@dataclass(frozen=True)
class ImageBatch:
    """One global batch.

    Attributes:
        rows: int64 (GB,), places in the image list.
        keys: uint64 (GB,), one hash per entry from which its augmentation is drawn.
    """

    rows: np.ndarray
    keys: np.ndarray


class ImageOrder:
    """Which image every entry of every global batch is, and how it is augmented.

    Args:
        list_hash: of the image list, so that another list has another order.
        num_images: in the list.
        seed: of the training.
        global_batch_size: images per step over all ranks.
    """

    def __init__(self, *, list_hash: str, num_images: int, seed: int, global_batch_size: int):
        self.num_images, self.global_batch_size = num_images, global_batch_size
        text = f"{IMAGE_ORDER_VERSION}:{list_hash}:{seed}"
        self._key = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")

    def batch(self, index: int) -> ImageBatch:
        """The global batch of an index, counted from 0 over all epochs."""
        positions = index * self.global_batch_size + np.arange(self.global_batch_size)
        epochs, places = np.divmod(positions, self.num_images)
        rows = np.empty_like(places)
        for epoch in range(epochs[0], epochs[-1] + 1):
            is_here = epochs == epoch
            rows[is_here] = permute(places[is_here], self.num_images, int(hash64(self._key, PERMUTATION, epoch)[0]))
        return ImageBatch(rows, hash64(self._key, AUGMENTATION, epochs, rows))

    def substitute(self, key: int, attempt: int) -> int:
        """The row that takes the place of an entry whose image cannot be used, as a function of the entry's key."""
        return int(hash64(self._key, SUBSTITUTE, key, attempt)[0] % np.uint64(self.num_images))


def list_hash(images: pa.Table) -> str:
    """sha-256 over the ids of an image listing, in its order."""
    return hashlib.sha256(images["image_id"].to_numpy().astype("<i8").tobytes()).hexdigest()


def augmentation(key: int, height: int, width: int, *, min_crop: float | None, flips: bool) -> Crop:
    """Where a training image is cut out of its source, at whole pixels.

    Args:
        key: what it is drawn from.
        height: of the source image in pixels, at least 1.
        width: likewise.
        min_crop: smallest side as a share of the shorter side; the centred square if None.
        flips: mirrors every second image.
    """
    size, x, y, flip = uniform(hash64(key, np.arange(4))).tolist()
    shorter, is_flipped = min(height, width), flips and flip < 0.5
    if min_crop is None:
        return Crop((width - shorter) // 2, (height - shorter) // 2, shorter, shorter, is_flipped)
    side = max(1, round(shorter * (min_crop + size * (1 - min_crop))))
    return Crop(int(x * (width - side + 1)), int(y * (height - side + 1)), side, side, is_flipped)
