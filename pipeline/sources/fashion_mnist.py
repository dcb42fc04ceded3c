"""Fashion-MNIST (Xiao, Rasul and Vollgraf 2017): 60,000 training and 10,000 held-out grey images, 28 x 28."""

import functools
import gzip
import hashlib
import os
import tempfile
import zlib

import numpy as np
import pyarrow as pa

from pipeline import storage
from pipeline.downloads import fetch
from pipeline.sources.contract import Example, Split, check_listing, listing
from stages.errors import BadImage, ConfigError
from stages.options import ImageOptions, SourceOptions

SYSTEM_FOLDER = "/usr/share/datasets/fashion-mnist"  # Debian package dataset-fashion-mnist
HOME = "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/"
# As published beside the data: https://github.com/zalandoresearch/fashion-mnist#get-the-data
# Debian packs the same images anew, so its files have other checksums; only downloads are held against these.
MD5 = {
    "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
    "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
    "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
    "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
}
PREFIX = {"train": "train", "holdout": "t10k"}
SIDE = 28


class FashionMnist:
    """IDX files in `source.path` (local or s3://), else in Debian's folder, else downloaded once into the user's cache and checked."""

    class_names = (
        "t-shirt",
        "trouser",
        "pullover",
        "dress",
        "coat",
        "sandal",
        "shirt",
        "sneaker",
        "bag",
        "ankle boot",
    )

    def __init__(self, options: SourceOptions, images: ImageOptions):
        self.options = options

    def list_images(self, split: Split) -> pa.Table:
        labels = _read_idx(self._file(f"{PREFIX[split]}-labels-idx1-ubyte.gz"))
        if len(labels) and labels.max() >= len(self.class_names):
            raise ConfigError(
                f"source.path is {self.options.path}, but its {split} labels go up to {labels.max()} and there are "
                f"{len(self.class_names)} classes. Put the files of Fashion-MNIST there."
            )
        # The two splits are numbered apart, so that an id says which image it is.
        ids = np.arange(len(labels)) + (0 if split == "train" else 1_000_000)
        uris = [f"fashion-mnist://{split}/{i}" for i in range(len(labels))]
        return check_listing(listing(ids, uris, labels.astype(np.int32)), self.options, split)

    def fetch(self, uri: str) -> bytes:
        split, index = uri.removeprefix("fashion-mnist://").split("/")
        images = _read_idx(self._file(f"{PREFIX[split]}-images-idx3-ubyte.gz"))
        if not 0 <= int(index) < len(images):
            raise FileNotFoundError(f"{uri} is not there: the file holds {len(images)} images")
        return images[int(index)].tobytes()

    def decode(self, data: bytes) -> Example:
        if len(data) != SIDE * SIDE:
            raise BadImage("truncated", f"{len(data)} bytes, but an image has {SIDE * SIDE}")
        return Example(np.frombuffer(data, np.uint8).reshape(SIDE, SIDE, 1))

    def _file(self, name: str) -> str:
        if self.options.path:
            try:
                return _given_file(storage.join(self.options.path, name))
            except FileNotFoundError:
                raise ConfigError(
                    f"source.path is {self.options.path}, but {name} is not in it. Put the four IDX files there."
                ) from None
        path = os.path.join(SYSTEM_FOLDER, name)
        if not os.path.exists(path):
            path = os.path.join(_cache_folder(), name)
            if not os.path.exists(path):
                _download(name, path)
        return path


@functools.cache
def _given_file(path: str) -> str:
    """The user's file on this machine. Raises FileNotFoundError."""
    if not storage.exists(path):
        raise FileNotFoundError(path)
    return storage.local_copy(path)


def _cache_folder() -> str:
    return os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "tessera", "fashion-mnist")


def _download(name: str, path: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        local = os.path.join(folder, name)
        try:
            fetch(HOME + name, local)
        except OSError as error:
            raise ConfigError(
                f"source.name is fashion-mnist, but {HOME + name} cannot be reached ({error}). Install Debian's "
                f"dataset-fashion-mnist, or put the four IDX files into a folder and set source.path."
            ) from error
        with open(local, "rb") as file:
            checksum = hashlib.md5(file.read(), usedforsecurity=False).hexdigest()
        if checksum != MD5[name]:
            raise ConfigError(
                f"source.name is fashion-mnist, but {HOME + name} does not have its published checksum. Try again later."
            )
        storage.put_file_if_absent(path, local)


@functools.lru_cache(maxsize=4)
def _read_idx(path: str) -> np.ndarray:
    """uint8 array of an IDX file: two zero bytes, type 8, number of dimensions, big-endian sizes, values.

    Raises:
        ConfigError: it is not such a file, or not a whole one.
    """
    try:
        with gzip.open(path, "rb") as file:
            data = file.read()
        if data[:3] != b"\0\0\x08":
            raise ValueError("no IDX header")
        shape = np.frombuffer(data, ">i4", data[3], offset=4)
        return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(shape)
    except (gzip.BadGzipFile, EOFError, zlib.error, ValueError, IndexError) as error:
        raise ConfigError(f"{path} is not a whole IDX file of bytes ({error}), but it must be. Replace it.") from error
