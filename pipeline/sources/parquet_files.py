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
from stages.errors import BadImage, ConfigError
from stages.options import ImageOptions, SourceOptions

SCHEME = "parquet://"
BINARY = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary, pa.types.is_binary_view)


class ParquetFiles:
    """Rows of the files at `source.path` (one file, or every .parquet below a folder), listed in order of id.

    By that order the first `num_images` are a fair sample, and so are neighbouring rows of a code dataset, however the files are sorted.
    The price is that nearly every image read decodes a row group of its own, which should be small.

    Columns: `image` (bytes, or structs of `bytes` and `path`, of which the path is read where the bytes are null) or `uri`; uris and paths
    are absolute, s3:// or relative to the file. Optionally `label` (integer, 0-based) and `image_id` (int64; where there is none, a hash
    of the path that `uri` stands for, relative to the folder, or else of file name and row), and columns of maps beside `image`. Classes
    are named by their number.
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
        if IMAGE not in _open(file).schema_arrow.names:
            raise BadImage("empty", f"row {row} of {file} has no uri")
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
    _check_columns(key, file, parquet.schema_arrow, maps)
    columns = [column for column in columns if column not in maps]  # a map may be called label, unless it is stored
    table = parquet.read(columns=[column for column in ("uri", "label", "image_id") if column in columns])
    uris, names = [f"{SCHEME}{file}#{row}" for row in range(n)], [f"{name}#{row}" for row in range(n)]
    if IMAGE not in columns:  # a row without a uri keeps its own, and `fetch` says what it lacks
        folder = file.removesuffix(name)
        for row, uri in enumerate(_listed_uris(key, file, table)):
            if uri:
                uris[row] = _absolute_uri(uri, file)
                names[row] = place_of(uris[row]).removeprefix(folder)
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


def _check_columns(key: str, file: str, schema: pa.Schema, maps: tuple[str, ...]) -> None:
    """Refuses a file without images or maps, or with other things than bytes in their place."""
    if IMAGE not in schema.names and "uri" not in schema.names:
        raise ConfigError(f"{key} leads to {file}, but it has neither an image nor a uri column. Add one of them.")
    missing = [column for column in (IMAGE, *maps) if maps and column not in schema.names]
    if missing:
        raise ConfigError(
            f"{key} leads to {file}, but it has no column {missing[0]}, and maps are columns beside {IMAGE}. Its columns are "
            f"{', '.join(schema.names)}; name maps of these."
        )
    for column in (IMAGE, *maps):
        kind = schema.field(column).type if column in schema.names else pa.binary()
        if not _holds_bytes(kind):
            things, way_out = ("images", ", or call a column of paths uri") if column == IMAGE else ("maps", "")
            raise ConfigError(
                f"{key} leads to {file}, but its {column} column is {kind}, and {things} are encoded images. Store their bytes{way_out}."
            )


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        index = kind.get_field_index("bytes")
        return index >= 0 and (pa.types.is_null(kind.field(index).type) or _holds_bytes(kind.field(index).type))
    value = kind.value_type if pa.types.is_dictionary(kind) else kind
    return any(is_kind(value) for is_kind in BINARY)


def _listed_uris(key: str, file: str, table: pa.Table) -> list[str | None]:
    uris = table["uri"].to_pylist()
    for uri in filter(None, uris):
        if not isinstance(uri, str):
            raise ConfigError(f"{key} leads to {file}, but its uri column is {table['uri'].type}. Store paths or s3:// uris as text.")
    return uris


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
    return [_content(table[column][row - start].as_py(), file, row) for column in columns]


def _content(value: Any, file: str, row: int) -> bytes | None:
    """Bytes as they are, those of a struct, or those of the file that a struct without bytes names."""
    if not isinstance(value, dict):
        return value
    path = value.get("path")
    if value["bytes"] is not None or not path:
        return value["bytes"]
    try:
        uri = _absolute_uri(path, file)
    except ConfigError as error:
        raise BadImage("empty", f"row {row} of {file} has no bytes: {error}") from error
    return storage.read_bytes(uri)


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
