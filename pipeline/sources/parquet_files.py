"""Images in Parquet files: a column of bytes (or of the {bytes, path} structs that dataset hubs use), or a column of uris."""

import functools
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.images import decode_image
from pipeline.sources.contract import Example, Split, check_listing, hashed_id, listing, split_by_hash
from stages.errors import ConfigError
from stages.options import ImageOptions, SourceOptions

SCHEME = "parquet://"


class ParquetFiles:
    """Rows of the files at `source.path` (one file, or every .parquet below a folder).

    Columns: `image` or `uri`; optionally `label` (int, 0-based) and `image_id` (int64). Classes are named by their number.
    """

    def __init__(self, options: SourceOptions, images: ImageOptions):
        if not options.path:
            raise ConfigError("source.path is not set, but parquet reads files. Name a file or a folder.")
        self.options = options
        labels = self._columns(options.path)[2]
        num_classes = 0 if labels is None else int(labels.max()) + 1
        if labels is not None and labels.min() < 0:
            raise ConfigError(f"source.path is {options.path}, but its label column holds {labels.min()}. Labels are 0-based.")
        self.class_names = tuple(str(i) for i in range(num_classes))

    def list_images(self, split: Split) -> pa.Table:
        path = self.options.holdout_path if split == "holdout" and self.options.holdout_path else str(self.options.path)
        ids, uris, labels = self._columns(path)
        if labels is not None and labels.max() >= len(self.class_names):
            raise ConfigError(f"source.holdout_path is {path}, but its label {labels.max()} is not among the training labels. Remove it.")
        order = np.argsort(ids, kind="stable")
        table = listing(ids[order], [uris[i] for i in order], None if labels is None else labels[order])
        if not self.options.holdout_path:
            table = split_by_hash(table, self.options, split)
        return check_listing(table, self.options, split)

    @staticmethod
    def _columns(path: str) -> tuple[np.ndarray, list[str], np.ndarray | None]:
        ids, uris, labels = [], [], []
        for file in _files(path):
            parquet = _open(file)
            names = parquet.schema_arrow.names
            wanted = [name for name in ("uri", "label", "image_id") if name in names]
            if "image" not in names and "uri" not in names:
                raise ConfigError(f"source.path is {path}, but {file} has neither an image nor a uri column. Its columns: {', '.join(names)}.")
            table, n = parquet.read(columns=wanted), parquet.metadata.num_rows
            uris += table["uri"].to_pylist() if "image" not in names else [f"{SCHEME}{file}#{row}" for row in range(n)]
            if "image_id" in names:
                ids.append(table["image_id"].to_numpy())
            else:
                name = file[len(path.rstrip("/")) + 1 :] if file != path else file.split("/")[-1]
                ids.append(np.array([hashed_id(f"{name}#{row}") for row in range(n)], dtype=np.int64))
            if "label" in names:
                labels.append(table["label"].to_numpy().astype(np.int32))
        if labels and len(labels) != len(ids):
            raise ConfigError(f"source.path is {path}, but only some of its files have a label column. Label all or none.")
        return np.concatenate(ids), uris, np.concatenate(labels) if labels else None

    def fetch(self, uri: str) -> bytes:
        if not uri.startswith(SCHEME):
            return storage.read_bytes(uri)
        file, _, row = uri[len(SCHEME) :].rpartition("#")
        return _read_row(file, int(row))

    def decode(self, data: bytes) -> Example:
        return Example(decode_image(data))


def _files(path: str) -> list[str]:
    files = [path] if path.endswith(".parquet") and storage.exists(path) else storage.list_files(path, suffix=".parquet")
    if not files:
        raise ConfigError(f"source.path is {path}, but there are no .parquet files. Name a file or a folder with some.")
    return files


@functools.lru_cache(maxsize=16)
def _open(file: str) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(storage.local_copy(file), memory_map=True)
    except pa.ArrowInvalid as error:
        raise ConfigError(f"source.path leads to {file}, but it is not Parquet ({error}). Remove it.") from None


def _read_row(file: str, row: int) -> bytes:
    group, start = _locate(file, row)
    value: Any = _read_group(file, group)[row - start].as_py()
    return (value["bytes"] if isinstance(value, dict) else value) or b""


def _locate(file: str, row: int) -> tuple[int, int]:
    metadata, start = _open(file).metadata, 0
    for group in range(metadata.num_row_groups):
        rows = metadata.row_group(group).num_rows
        if row < start + rows:
            return group, start
        start += rows
    raise FileNotFoundError(f"{file} has no row {row}")


@functools.lru_cache(maxsize=4)
def _read_group(file: str, group: int) -> pa.ChunkedArray:
    return _open(file).read_row_group(group, columns=["image"])["image"]
