"""Codes of a condition for the rows of a code dataset: a second code dataset of the same images and views, by another tokenizer."""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.code_dataset import CodeDataset
from pipeline.code_dataset.parts import CROP_COLUMNS, IMAGE_ID
from pipeline.code_dataset.plan import read_images
from stages.errors import ArtefactError


class ConditionCodes:
    """The condition's codes by row of the images' code dataset.

    Args:
        conditions: code dataset of the condition, such as one that `tokenize` made with `tokenizer.input=segmentation`.
        images: the code dataset whose rows are asked for. Its images may be fewer.

    Attributes:
        dataset: the code dataset of the condition.

    Raises:
        ArtefactError: other views, images without a condition, other images, or other crops of them.
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
        check_same_images(conditions, read_images(images.path, images.manifest["plan_fp"]), _image_ids(images), images.path)
        _check_same_crops(conditions, images, self._matches)

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
    return _find(_image_ids(dataset), image_ids)


def check_same_images(conditions: CodeDataset, listing: pa.Table, image_ids: np.ndarray, where: str) -> None:
    """Refuses codes of conditions that were made of other images: ids alone may be the same in any two sources.

    The hashes of what was read are no help, since a source reads an image with the maps that a job needs, and these differ. So an image
    is the same one where its uri, its size or its entity tag is, so that images may be moved, and its size is not known to be another.

    Args:
        conditions: code dataset of the conditions.
        listing: `pipeline.sources.listing` of the images, or more.
        image_ids: int64 (n,), of images that are in both.
        where: the images are listed, for the message.

    Raises:
        ArtefactError: naming one image.
    """
    ours, theirs = (
        table.take(_find(table[IMAGE_ID].to_numpy(), image_ids))
        for table in (listing, read_images(conditions.path, conditions.manifest["plan_fp"]))
    )
    same_uri, same_size, same_tag = (pc.equal(ours[name], theirs[name]) for name in ("uri", "num_bytes", "etag"))
    is_alike = pc.or_(pc.or_(same_uri, pc.fill_null(same_size, False)), pc.fill_null(same_tag, False))
    is_other = np.flatnonzero(~pc.and_(is_alike, pc.fill_null(same_size, True)).to_numpy())
    if len(is_other):
        here, there = (table.slice(is_other[0], 1).to_pylist()[0] for table in (ours, theirs))
        raise ArtefactError(
            f"The code dataset of conditions {conditions.path} was made of other images than {where}: image_id {here[IMAGE_ID]} is "
            f"{_describe(there)} there and {_describe(here)} here. Tokenize both from the same source."
        )


def _describe(image: dict[str, Any]) -> str:
    return image["uri"] if image["num_bytes"] is None else f"{image['uri']} of {image['num_bytes']} bytes"


def _check_same_crops(conditions: CodeDataset, images: CodeDataset, matches: np.ndarray) -> None:
    """Of random crops every view counts; of others one tells."""
    views, num_views = images.manifest["views"], images.num_views
    for view in [i for i, name in enumerate(views) if name.startswith("random-crop")] or [0]:
        ours = images.describe(np.arange(images.num_images) * num_views + view)
        theirs = conditions.describe(matches * num_views + view)
        differs = np.any([ours[name].to_numpy() != theirs[name].to_numpy() for name in CROP_COLUMNS], axis=0)
        if differs.any():
            here, there = (table.slice(differs.argmax(), 1).to_pylist()[0] for table in (ours, theirs))
            boxes = [[row[name] for name in CROP_COLUMNS] for row in (there, here)]
            raise ArtefactError(
                f"The code dataset of conditions {conditions.path} has other crops than {images.path}: {views[view]} of image_id "
                f"{here[IMAGE_ID]} is {boxes[0]} there and {boxes[1]} here ({', '.join(CROP_COLUMNS)}). Tokenize both from the same source."
            )


def _image_ids(dataset: CodeDataset) -> np.ndarray:
    """Of every image, int64 (num_images,)."""
    return dataset.image_ids(np.arange(0, dataset.num_rows, dataset.num_views))


def _find(ids: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    order = np.argsort(ids)
    found = order[np.searchsorted(ids[order], wanted).clip(max=len(ids) - 1)]
    return np.where(ids[found] == wanted, found, -1)


def _matches(conditions: CodeDataset, images: CodeDataset) -> np.ndarray:
    """For every image the place of its condition, int64 (num_images,)."""
    wanted = _image_ids(images)
    found = find_images(conditions, wanted)
    missing = wanted[found < 0]
    if len(missing):
        raise ArtefactError(
            f"The code dataset of conditions {conditions.path} lacks {len(missing)} of the {images.num_images} images of {images.path}, "
            f"such as image_id {missing[0]}. Tokenize both from the same source; with codes.conditions naming the map, images "
            f"without it are left out of the codes of images, too."
        )
    return found
