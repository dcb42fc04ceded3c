"""Training images of a tokenizer: fetched, decoded, cut out and resized, or condition maps of them, as uint8 pixels."""

import logging
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.fetch import fetch
from pipeline.image_order import ImageOrder, augmentation
from pipeline.inputs import render_views
from pipeline.order import batch_index
from pipeline.sources import Source
from stages.errors import BadImage, ConfigError
from stages.options import ImageOptions, TokenizerOptions, TokenizerTrainOptions

logger = logging.getLogger(__name__)

MAX_SUBSTITUTES = 16  # in a row


class ImageReader:
    """Reads entries of global batches. Small and picklable: it travels to the tasks that read.

    An image that cannot be used is named in the log, and another, which follows from the order alone, takes its place.

    Args:
        source: of the images.
        order: of the training.
        images: their size and channels.
        tokenizer: what is tokenized.
        train: how it is augmented.
    """

    def __init__(
        self,
        source: Source,
        order: ImageOrder,
        images: ImageOptions,
        tokenizer: TokenizerOptions,
        train: TokenizerTrainOptions,
    ):
        self.source, self.order, self.images, self.tokenizer, self.train = source, order, images, tokenizer, train

    def read_step(self, step: int, entries: slice, skipped: Any, table: pa.Table) -> tuple[np.ndarray, np.ndarray]:
        """A rank's entries of the global batch that a step consumes.

        Args:
            step: counted from 0 over the training.
            entries: of the global batch.
            skipped: ranges of global batches that are left out, as for `pipeline.order.batch_index`.
            table: the image list, of which `uri` is read.

        Returns:
            Rows int64 (b,) and pixels uint8 (b, size, size, C): of a map of labels the ids, of one of numbers 255 times them.

        Raises:
            ConfigError: no image in a row of many can be used.
            OSError: the storage failed several times.
        """
        batch = self.order.batch(batch_index(step, skipped))
        rows, keys = batch.rows[entries], batch.keys[entries]
        pixels = [self._read_entry(int(row), int(key), table) for row, key in zip(rows, keys)]
        return rows, np.stack(pixels)

    def _read_entry(self, row: int, key: int, table: pa.Table) -> np.ndarray:
        fault = ""
        for attempt in range(MAX_SUBSTITUTES):
            uri = table["uri"][row].as_py()
            try:
                return self._read(uri, key)
            except BadImage as error:
                logger.warning("Image %s cannot be used, another takes its place: %s (%s)", uri, error.kind, error.message)
                fault, row = error.message, self.order.substitute(key, attempt)
        raise ConfigError(
            f"{MAX_SUBSTITUTES} images in a row cannot be used, the last {uri}: {fault}. The log says what is wrong with each; mend them."
        )

    def _read(self, uri: str, key: int) -> np.ndarray:
        example = self.source.decode(fetch(self.source, uri))
        height, width = example.image.shape[:2]
        if 0 in (height, width):
            raise BadImage("too-small", f"the image has {width} x {height} pixels")
        crop = augmentation(key, height, width, min_crop=self.train.min_crop, flips=self.train.random_flip)
        return render_views(example, [crop], self.images, self.tokenizer, uri)[0]
