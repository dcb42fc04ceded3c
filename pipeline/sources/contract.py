"""What a source must do, and helpers that sources share."""

import hashlib
import logging
import posixpath
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from stages.errors import ConfigError, TesseraError
from stages.hashing import hash64, uniform
from stages.options import SourceOptions

logger = logging.getLogger(__name__)

Split = Literal["train", "holdout"]
# In this order a source that learns its classes from the training images on the way need not list these again for them.
SPLITS: tuple[Split, ...] = ("train", "holdout")
IMAGE = "image"  # what is no map of an image


@dataclass(frozen=True)
class Example:
    """One decoded image, uint8 (H, W, 1 or 3), and what else is known of it per pixel or point."""

    image: np.ndarray
    conditions: dict[str, np.ndarray] = field(default_factory=dict)


class Source(Protocol):
    """Images by uri. Sources are small and picklable: they travel to the tasks that read."""

    class_names: tuple[str, ...]  # empty when images have no classes

    def list_images(self, split: Split) -> pa.Table:
        """Table of `listing`; ids unique, and the same in every listing. ConfigError when there is nothing."""

    def fetch(self, uri: str) -> bytes:
        """The stored bytes of an image.

        Raises:
            FileNotFoundError: it is gone.
            BadImage: the source does not say where it is.
            OSError: another fault of storage.
        """

    def decode(self, data: bytes) -> Example:
        """Pixels of fetched bytes. BadImage when the content cannot be used."""


def listing(
    image_id: np.ndarray,
    uri: Sequence[str],
    label: np.ndarray | None = None,
    num_bytes: Sequence[int | None] | None = None,
    etag: Sequence[str] | None = None,
) -> pa.Table:
    """Table with image_id int64, uri string, label int32, num_bytes int64, etag string; what is not given is null.

    Raises:
        ConfigError: a uri that is not UTF-8, as the name of a local file need not be.
    """
    n = len(image_id)
    try:
        uris = pa.array(uri, pa.string())
    except UnicodeEncodeError as error:
        raise ConfigError(f"The source has the file {error.object!r}, but that name is not UTF-8. Rename the file.") from error
    return pa.table(
        {
            "image_id": pa.array(image_id, pa.int64()),
            "uri": uris,
            "label": pa.nulls(n, pa.int32()) if label is None else pa.array(label, pa.int32()),
            "num_bytes": pa.nulls(n, pa.int64()) if num_bytes is None else pa.array(num_bytes, pa.int64()),
            "etag": pa.nulls(n, pa.string()) if etag is None else pa.array(etag, pa.string()),
        }
    )


def hashed_id(text: str) -> int:
    """A 63-bit id of a name: the start of its sha-256. A file's name has one even if it is not UTF-8, which `listing` refuses."""
    return int.from_bytes(hashlib.sha256(text.encode(errors="surrogateescape")).digest()[:8], "little") >> 1


def split_path(options: SourceOptions, split: Split) -> tuple[str, str | None]:
    """The configuration key that says where a split lies, and its value."""
    if split == "holdout" and options.holdout_path:
        return "source.holdout_path", options.holdout_path
    return "source.path", options.path


def check_listing(table: pa.Table, options: SourceOptions, split: Split) -> pa.Table:
    """The listing, cut to the number of images asked for.

    Raises:
        ConfigError: it is empty, or two images share an id.
    """
    key, path = split_path(options, split)
    if len(table) == 0:
        raise ConfigError(f"{key} is {path}, but there are no {split} images in it. Name a place with images.")
    ids, counts = np.unique(table["image_id"].to_numpy(), return_counts=True)
    if len(ids) != len(table):
        twice = table["uri"].filter(pc.equal(table["image_id"], ids[counts.argmax()]))[0]
        raise ConfigError(f"{key} is {path}, but two of its images have the same image_id, that of {twice}. Make ids and paths unique.")
    limit = options.num_images if split == "train" else options.num_holdout_images
    return table if limit is None else table.slice(0, limit)


def split_by_hash(table: pa.Table, options: SourceOptions, split: Split) -> pa.Table:
    """Rows of a split where the source has none of its own.

    With `holdout_path` there is nothing to divide; else `holdout_fraction` of the ids, chosen by hash, are held out.

    Raises:
        ConfigError: held-out images are asked for, but neither holdout_path nor holdout_fraction is set; or one file has several ids,
            of which only some are held out.
    """
    if options.holdout_path:
        return table
    if options.holdout_fraction == 0:
        if split == "holdout":
            raise ConfigError(
                "source.holdout_fraction is 0 and source.holdout_path is not set, but evaluation compares with held-out"
                " images. Set one of them."
            )
        return table
    is_held_out = uniform(hash64(options.seed, table["image_id"].to_numpy())) < options.holdout_fraction
    held_out, others = table.filter(pa.array(is_held_out)), table.filter(pa.array(~is_held_out))
    shared = shared_images(held_out, others)
    if shared:
        raise ConfigError(
            f"source.holdout_fraction is {options.holdout_fraction}, but {shared[0]} is listed more than once, and would be both held "
            f"out and trained on. List every file once."
        )
    return held_out if split == "holdout" else others


def list_split(source: Source, options: SourceOptions, split: Split) -> pa.Table:
    """The listing of a split, compared with the other one where `holdout_path` names it.

    Where the other one cannot be listed, which is logged, there is nothing to compare: who needs it will be told.

    Raises:
        ConfigError: the source's, or an image is in both.
    """
    if not options.holdout_path:
        return source.list_images(split)
    tables: dict[Split, pa.Table] = {}
    for each in SPLITS:
        try:
            tables[each] = source.list_images(each)
        except TesseraError as error:
            if each == split:
                raise
            logger.warning("Training and held-out images are not compared: %s", error)
    shared = shared_images(tables["holdout"], tables["train"]) if len(tables) == len(SPLITS) else []
    if shared:
        raise ConfigError(
            f"source.holdout_path is {options.holdout_path}, but {len(shared)} of its images are among those of source.path, "
            f"{options.path}, such as {shared[0]}. Hold out images that are not trained on."
        )
    return tables[split]


def shared_images(table: pa.Table, other: pa.Table) -> list[str]:
    """Uris of a listing that stand for files of another listing."""
    places = set(map(place_of, other["uri"].to_pylist()))
    return [uri for uri in table["uri"].to_pylist() if place_of(uri) in places]


def place_of(uri: str) -> str:
    """What a uri stands for: one spelling of a local path, others as they are, since in a store other spellings are other keys."""
    return posixpath.normpath(uri) if uri.startswith("/") else uri
