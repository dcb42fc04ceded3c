"""Images in Parquet files: a column of bytes (or of the {bytes, path} structs of dataset hubs), or a column of uris."""

import functools
import hashlib
import os
import posixpath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.sources.contract import (
    IMAGE,
    Example,
    Split,
    check_listing,
    hashed_id,
    listing,
    place_of,
    split_by_hash,
    split_path,
)
from pipeline.sources.map_files import decode_packed, map_columns, pack
from stages.errors import ConfigError
from stages.options import ImageOptions, SourceOptions

SCHEME = "parquet://"


class ParquetFiles:
    """Rows of the files at `source.path` (one file, or every .parquet below a folder), listed in order of id.

    By that order the first `num_images` are a fair sample, and so are neighbouring rows of a code dataset, however the files are sorted.
    The price is that nearly every image read decodes a row group of its own, which should be small.

    Columns: `image` or `uri` (absolute, or relative to the file); optionally `label` (integer, 0-based) and `image_id`
    (int64; where there is none, a hash of the path that `uri` stands for, relative to the folder, or else of file name and row), and
    columns of maps beside `image`. Classes are named by their number.
    The entity tag of a row is a hash of its file's footer, which a file that changed seldom keeps.
    """

    def __init__(self, options: SourceOptions, images: ImageOptions):
        if not options.path:
            raise ConfigError("source.path is not set, but parquet reads files. Name a file or a folder.")
        self.options, self._maps = options, map_columns(options)
        labels = _rows("source.path", options.path, self._maps)["label"]
        num_classes = 0 if labels.null_count else max(labels.to_pylist(), default=-1) + 1
        self.class_names = tuple(str(i) for i in range(num_classes))

    def list_images(self, split: Split) -> pa.Table:
        key, path = split_path(self.options, split)
        table = _rows(key, str(path), self._maps).sort_by("image_id")
        labels = table["label"]
        highest = -1 if labels.null_count else max(labels.to_pylist(), default=-1)
        if highest >= len(self.class_names):
            raise ConfigError(
                f"{key} is {path}, but its label {highest} is not one of the {len(self.class_names)} classes of the "
                f"training images. Use the same classes in both."
            )
        return check_listing(split_by_hash(table, self.options, split), self.options, split)

    def fetch(self, uri: str) -> bytes:
        if not uri.startswith(SCHEME):
            return storage.read_bytes(uri)
        file, _, row = uri.removeprefix(SCHEME).rpartition("#")
        image, *maps = _read_row(file, int(row), (IMAGE, *self._maps))
        return pack(image or b"", dict(zip(self._maps, maps, strict=True)))

    def decode(self, data: bytes) -> Example:
        return decode_packed(data, self.options)


def _rows(key: str, path: str, maps: tuple[str, ...]) -> pa.Table:
    """Listing of every row of every file, in the order of the files. Labels are all there or all null; columns of maps are there."""
    root = storage.absolute(path)
    is_file = root.endswith(".parquet") and storage.exists(root)
    files = [root] if is_file else storage.list_files(root, suffix=".parquet", follow_links=True)
    if not files:
        raise ConfigError(f"{key} is {path}, but there are no .parquet files. Name a file or a folder with some.")
    folder = posixpath.dirname(root) if is_file else root
    tables = [_file_rows(key, file, file.removeprefix(folder + "/"), maps) for file in files]
    table = pa.concat_tables(tables)
    if 0 < table["label"].null_count < len(table):
        raise ConfigError(f"{key} is {path}, but only some of its rows have a label. Label all or none.")
    return table


def _file_rows(key: str, file: str, name: str, maps: tuple[str, ...]) -> pa.Table:
    parquet = _open(file)
    columns, n = parquet.schema_arrow.names, parquet.metadata.num_rows
    if IMAGE not in columns and "uri" not in columns:
        raise ConfigError(f"{key} leads to {file}, but it has neither an image nor a uri column. Add one of them.")
    missing = [column for column in (IMAGE, *maps) if maps and column not in columns]
    if missing:
        raise ConfigError(
            f"{key} leads to {file}, but it has no column {missing[0]}, and maps are columns beside {IMAGE}. Its columns are "
            f"{', '.join(columns)}; name maps of these."
        )
    for column in maps:
        kind = parquet.schema_arrow.field(column).type
        kind = kind.field("bytes").type if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 else kind
        if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
            raise ConfigError(f"{key} leads to {file}, but its {column} column is {kind}, and maps are encoded images. Store their bytes.")
    columns = [column for column in columns if column not in maps]  # a map may be called label, unless it is stored
    table = parquet.read(columns=[column for column in ("uri", "label", "image_id") if column in columns])
    names = [f"{name}#{row}" for row in range(n)]
    if IMAGE in columns:
        uris = [f"{SCHEME}{file}#{row}" for row in range(n)]
    else:
        uris = [_absolute_uri(uri or "", file) for uri in table["uri"].to_pylist()]
        folder = file.removesuffix(name)
        names = [place_of(uri).removeprefix(folder) if given else row for uri, given, row in zip(uris, table["uri"].to_pylist(), names)]
    if "image_id" in columns:
        ids = _integers(key, file, table, "image_id")
    else:
        ids = np.array(list(map(hashed_id, names)), dtype=np.int64)
    etags = [_footer_hash(file)] * n
    if "label" not in columns or (n and table["label"].null_count == n):
        return listing(ids, uris, etag=etags)
    labels = _integers(key, file, table, "label")
    if n and not 0 <= labels.min() <= labels.max() < 2**31:
        raise ConfigError(
            f"{key} leads to {file}, but its labels run from {labels.min()} to {labels.max()}. Number classes from 0."
        )
    return listing(ids, uris, labels.astype(np.int32), etag=etags)


def _footer_hash(file: str) -> str:
    """Half the sha-256 (hex) of a file's footer: of where its columns lie, how long they are and what they span."""
    with open(storage.local_copy(file), "rb") as stream:
        stream.seek(-8, os.SEEK_END)  # the length of the footer in four bytes, and a magic number
        num_bytes = int.from_bytes(stream.read(4), "little")
        stream.seek(-8 - num_bytes, os.SEEK_END)
        return hashlib.sha256(stream.read(num_bytes)).hexdigest()[:32]


def _integers(key: str, file: str, table: pa.Table, column: str) -> np.ndarray:
    values = table[column]
    if not pa.types.is_integer(values.type) or values.null_count:
        raise ConfigError(
            f"{key} leads to {file}, but its {column} column is {values.type} with {values.null_count} nulls. "
            f"Store integers in every row."
        )
    return values.to_numpy().astype(np.int64)


def _absolute_uri(uri: str, file: str) -> str:
    if uri.startswith(("/", SCHEME)):
        return uri
    storage.check_address(f"A uri of {file}", uri)
    return uri if uri.startswith(storage.S3) else storage.join(posixpath.dirname(file), uri)


@functools.lru_cache(maxsize=16)
def _open(file: str) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(storage.local_copy(file), memory_map=True)
    except pa.ArrowInvalid as error:
        raise ConfigError(f"{file} is one of the files of the source, but it is not Parquet ({error}). Remove it.") from error


def _read_row(file: str, row: int, columns: tuple[str, ...]) -> list[bytes | None]:
    group, start = _locate(file, row)
    table = _read_group(file, group, columns)
    values: list[Any] = [table[column][row - start].as_py() for column in columns]
    return [value["bytes"] if isinstance(value, dict) else value for value in values]


def _locate(file: str, row: int) -> tuple[int, int]:
    metadata, start = _open(file).metadata, 0
    for group in range(metadata.num_row_groups):
        rows = metadata.row_group(group).num_rows
        if row < start + rows:
            return group, start
        start += rows
    raise FileNotFoundError(f"{file} has no row {row}")


@functools.lru_cache(maxsize=4)
def _read_group(file: str, group: int, columns: tuple[str, ...]) -> pa.Table:
    return _open(file).read_row_group(group, columns=list(columns))
