"""Codes of a condition for the rows of a code dataset: a second code dataset of the same images and views, by another tokenizer."""

import numpy as np

from pipeline.code_dataset import CodeDataset
from stages.errors import ArtefactError


class ConditionCodes:
    """The condition's codes by row of the images' code dataset.

    Args:
        conditions: code dataset of the condition, such as one that `tokenize` made with `tokenizer.input=segmentation`.
        images: the code dataset whose rows are asked for. Its images may be fewer.

    Attributes:
        dataset: the code dataset of the condition.

    Raises:
        ArtefactError: other views, or images without a condition.
    """

    def __init__(self, conditions: CodeDataset, images: CodeDataset):
        self.dataset = conditions
        ours, theirs = conditions.manifest["views"], images.manifest["views"]
        if ours != theirs:
            raise ArtefactError(
                f"The code dataset of conditions {conditions.path} has the views {', '.join(ours)}, but {images.path} has "
                f"{', '.join(theirs)}. Tokenize both with the same images.views."
            )
        self._num_views = images.num_views
        self._matches = _matches(conditions, images)

    def labels(self, rows: np.ndarray, *, wait: bool = True) -> np.ndarray:
        """Codes of the condition of rows int64 (n,) of the images, int64 (n, P). Raises like `CodeDataset.codes`."""
        return self.dataset.codes(self._rows(rows), wait=wait).astype(np.int64)

    def prefetch(self, rows: np.ndarray) -> None:
        """Starts to fetch what rows that will be read later need."""
        self.dataset.prefetch(self._rows(rows))

    def settle(self) -> None:
        """Waits until all that was read is checked. Raises ArtefactError if a row group is damaged."""
        self.dataset.settle()

    def _rows(self, rows: np.ndarray) -> np.ndarray:
        image, view = np.divmod(rows, self._num_views)
        return self._matches[image] * self._num_views + view


def find_images(dataset: CodeDataset, image_ids: np.ndarray) -> np.ndarray:
    """The place of each image (n,) among those of a code dataset, int64 (n,); -1 where it is not one of them."""
    ids = dataset.image_ids(np.arange(0, dataset.num_rows, dataset.num_views))
    order = np.argsort(ids)
    found = order[np.searchsorted(ids[order], image_ids).clip(max=len(ids) - 1)]
    return np.where(ids[found] == image_ids, found, -1)


def _matches(conditions: CodeDataset, images: CodeDataset) -> np.ndarray:
    """For every image the place of its condition, int64 (num_images,)."""
    wanted = images.image_ids(np.arange(0, images.num_rows, images.num_views))
    found = find_images(conditions, wanted)
    missing = wanted[found < 0]
    if len(missing):
        raise ArtefactError(
            f"The code dataset of conditions {conditions.path} lacks {len(missing)} of the {images.num_images} images of {images.path}, "
            f"such as image_id {missing[0]}. Tokenize both from the same source; with codes.conditions naming the map, images "
            f"without it are left out of the codes of images, too."
        )
    return found
