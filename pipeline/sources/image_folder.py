"""Image files: one folder per class, one flat folder, or a list file. Local or s3://."""

import posixpath

import numpy as np
import pyarrow as pa

from pipeline import storage
from pipeline.images import decode_image
from pipeline.sources.contract import Example, Split, check_listing, hashed_id, listing, split_by_hash
from stages.errors import ConfigError
from stages.options import ImageOptions, SourceOptions

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
LIST_SUFFIXES = (".txt", ".tsv", ".lst")


class ImageFolder:
    """Images below `source.path`.

    A folder with subfolders gives one class per subfolder, in order of name; a flat folder gives none. A list file has one path per
    line, relative to the file, and after a tab optionally the class name. An image's id is a hash of its path relative to the root,
    and images are listed in order of id, so that the first `num_images` are a fair sample.
    """

    def __init__(self, options: SourceOptions, images: ImageOptions):
        if not options.path:
            raise ConfigError("source.path is not set, but image-folder reads files. Name a folder or a list file.")
        self.options = options
        self.class_names = tuple(sorted({name for _, name in _entries(options.path) if name}))

    def list_images(self, split: Split) -> pa.Table:
        if split == "holdout" and self.options.holdout_path:
            return check_listing(self._table(self.options.holdout_path), self.options, split)
        table = self._table(str(self.options.path))
        if not self.options.holdout_path:
            table = split_by_hash(table, self.options, split)
        return check_listing(table, self.options, split)

    def _table(self, root: str) -> pa.Table:
        entries = _entries(root)
        numbers = {name: i for i, name in enumerate(self.class_names)}
        unknown = {name for _, name in entries if name and name not in numbers}
        if unknown:
            raise ConfigError(f"source.holdout_path is {root}, but its class {min(unknown)} is not among the training classes. Remove it.")
        prefix = len(_root_folder(root).rstrip("/")) + 1
        ids = np.array([hashed_id(path[prefix:]) for path, _ in entries], dtype=np.int64)
        order = np.argsort(ids, kind="stable")
        labels = np.array([numbers[name] for _, name in entries], np.int32)[order] if self.class_names else None
        return listing(ids[order], [entries[i][0] for i in order], labels)

    def fetch(self, uri: str) -> bytes:
        return storage.read_bytes(uri)

    def decode(self, data: bytes) -> Example:
        return Example(decode_image(data))


def _root_folder(path: str) -> str:
    return posixpath.dirname(path) if path.endswith(LIST_SUFFIXES) else path


def _entries(root: str) -> list[tuple[str, str]]:
    """(path, class name or "") of every image."""
    if root.endswith(LIST_SUFFIXES):
        return _list_file_entries(root)
    paths = [path for path in storage.list_files(root) if path.lower().endswith(SUFFIXES)]
    if not paths:
        raise ConfigError(f"source.path is {root}, but there are no images in it ({', '.join(SUFFIXES)}). Name a place with images.")
    prefix = len(root.rstrip("/")) + 1
    folders = [path[prefix:].split("/")[0] if "/" in path[prefix:] else "" for path in paths]
    if "" in folders and any(folders):
        stray = paths[folders.index("")]
        raise ConfigError(f"source.path is {root}, which has class folders, but {stray} lies beside them. Move it into a class folder.")
    return list(zip(paths, folders))


def _list_file_entries(path: str) -> list[tuple[str, str]]:
    try:
        lines = storage.read_bytes(path).decode().splitlines()
    except FileNotFoundError:
        raise ConfigError(f"source.path is {path}, but there is no such list file. Name an existing one.") from None
    entries = []
    for line in filter(None, map(str.strip, lines)):
        name, _, label = line.partition("\t")
        is_absolute = name.startswith(("/", storage.S3))
        entries.append((name if is_absolute else storage.join(posixpath.dirname(path) or ".", name), label.strip()))
    if not entries:
        raise ConfigError(f"source.path is {path}, but the list is empty. Write one path per line.")
    if any(label for _, label in entries) and not all(label for _, label in entries):
        raise ConfigError(f"source.path is {path}, but only some of its lines name a class. Label all or none.")
    return entries
