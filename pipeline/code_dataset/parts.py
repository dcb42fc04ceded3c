"""Parts: legal Parquet in which row i of every column that training reads is a computable byte offset.

Such a column is addressed: required, fixed width, PLAIN, uncompressed, one page per row group, so that the values of a column
chunk are its last rows * width bytes. The offsets are verified against the values when a part is made. The other columns say
which image and crop a row is; they are encoded to be small.
"""

import io
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from pipeline.code_dataset.codec import bytes_per_row, num_bits, pack

MAX_ROW_GROUP_ROWS = 16_384
MAX_ROW_GROUP_BYTES = 8 << 20
CODES, IMAGE_ID, VIEW, LABEL, SOURCE_SHA256 = "codes", "image_id", "view", "label", "source_sha256"
DESCRIBED = {
    IMAGE_ID: pa.int64(),
    VIEW: pa.int32(),
    "crop_left": pa.float32(),
    "crop_top": pa.float32(),
    "crop_width": pa.float32(),
    "crop_height": pa.float32(),
    "is_flipped": pa.bool_(),
}
CROP_COLUMNS = tuple(DESCRIBED)[2:]
OWN_COLUMNS = (*DESCRIBED, LABEL, CODES, SOURCE_SHA256)  # names that no condition map may have
LABEL_BYTES = 4


@dataclass(frozen=True)
class RowFormat:
    """What a row of a code dataset holds.

    Attributes:
        num_codes: codes per row.
        codebook_size: stored codes are in [0, codebook_size).
        has_labels: whether there is a label column.
        conditions: names of condition maps, one byte per code; none of OWN_COLUMNS, and none twice.
    """

    num_codes: int
    codebook_size: int
    has_labels: bool
    conditions: tuple[str, ...] = ()

    @property
    def bits(self) -> int:
        """Bits per stored code."""
        return num_bits(self.codebook_size)

    @property
    def bytes_per_row(self) -> int:
        """Bytes of a row's packed codes."""
        return bytes_per_row(self.num_codes, self.bits)

    @property
    def addressed(self) -> dict[str, int]:
        """Columns that can be read by byte offset, with the bytes of one value."""
        labels = {LABEL: LABEL_BYTES} if self.has_labels else {}
        return {**labels, **{name: self.num_codes for name in self.conditions}, CODES: self.bytes_per_row}

    @property
    def schema(self) -> pa.Schema:
        """Of a part. Every column is required."""
        types = {**DESCRIBED, **{name: pa.binary(width) for name, width in self.addressed.items()}}
        if self.has_labels:
            types[LABEL] = pa.int32()
        return pa.schema([pa.field(name, kind, nullable=False) for name, kind in types.items()])

    @property
    def shard_schema(self) -> pa.Schema:
        """Of a shard's part, which also knows the sha-256 of the bytes that each row was made of."""
        return self.schema.append(pa.field(SOURCE_SHA256, pa.binary(32), nullable=False))

    def with_codebook_size(self, codebook_size: int) -> "RowFormat":
        """The same rows over another codebook."""
        return replace(self, codebook_size=codebook_size)

    def row_group_rows(self) -> int:
        """Rows per row group: a power of two, so that a shift finds a row's group, and few enough for one range request."""
        rows, row_bytes = MAX_ROW_GROUP_ROWS, sum(self.addressed.values())
        while rows > 1 and rows * row_bytes > MAX_ROW_GROUP_BYTES:
            rows //= 2
        return rows


def byte_rows(column: pa.ChunkedArray | pa.Array, width: int) -> np.ndarray:
    """A required fixed-width column as uint8 (n, width)."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    flat = np.frombuffer(array.buffers()[1], np.uint8, len(array) * width, array.offset * width)
    return flat.reshape(len(array), width)


def byte_column(rows_NB: np.ndarray) -> pa.Array:
    """uint8 (n, width) as a column of fixed-size binary values."""
    n, width = rows_NB.shape
    return pa.Array.from_buffers(pa.binary(width), n, [None, pa.py_buffer(np.ascontiguousarray(rows_NB).data)])


def make_rows(
    row_format: RowFormat,
    *,
    codes: np.ndarray,
    image_ids: np.ndarray,
    views: np.ndarray,
    crops: np.ndarray,
    is_flipped: np.ndarray,
    source_sha256: np.ndarray,
    labels: np.ndarray | None = None,
    conditions: dict[str, np.ndarray] | None = None,
) -> pa.Table:
    """Rows of a shard as a table of `row_format.shard_schema`.

    Args:
        row_format: of the shard.
        codes: integers (n, num_codes).
        image_ids: int64 (n,).
        views: (n,), indices into the dataset's views.
        crops: (n, 4): left, top, width and height in pixels of the upright source image.
        is_flipped: bool (n,), whether the crop was mirrored.
        source_sha256: uint8 (n, 32), of the bytes that the source stores.
        labels: (n,), -1 where an image has none; needed if the format has labels.
        conditions: uint8 (n, num_codes) per condition of the format.

    Raises:
        ValueError: a code is outside [0, codebook_size).
    """
    if codes.size and not 0 <= codes.min() <= codes.max() < row_format.codebook_size:
        raise ValueError(
            f"codes span [{codes.min()}, {codes.max()}], but the codebook has {row_format.codebook_size} entries"
        )
    columns = {
        IMAGE_ID: pa.array(image_ids, pa.int64()),
        VIEW: pa.array(views, pa.int32()),
        **{name: pa.array(crops[:, i], pa.float32()) for i, name in enumerate(CROP_COLUMNS[:4])},
        CROP_COLUMNS[4]: pa.array(is_flipped, pa.bool_()),
        CODES: byte_column(pack(codes, row_format.bits)),
        SOURCE_SHA256: byte_column(source_sha256),
    }
    if row_format.has_labels:
        columns[LABEL] = pa.array(labels, pa.int32())
    for name in row_format.conditions:
        columns[name] = byte_column((conditions or {})[name])
    return pa.table([columns[name] for name in row_format.shard_schema.names], schema=row_format.shard_schema)


def encode_part(table: pa.Table, row_format: RowFormat, row_group_rows: int) -> tuple[bytes, list[dict[str, Any]]]:
    """The bytes of a part and its row groups.

    Args:
        table: of `row_format.schema`, with or without SOURCE_SHA256.
        row_format: of the dataset.
        row_group_rows: rows per row group.

    Returns:
        The file, and per row group its rows and each column's `offset`, `bytes` and `xxh3_64`: of the values for an addressed
        column, of the column chunk for another.
    """
    data = _write_parquet(table, row_format, row_group_rows)
    return data, _row_groups(data, table, row_format.addressed)


def _write_parquet(table: pa.Table, row_format: RowFormat, row_group_rows: int) -> bytes:
    buffer = io.BytesIO()
    addressed = row_format.addressed
    others = [name for name in table.column_names if name not in addressed]
    pq.write_table(
        table,
        buffer,
        row_group_size=row_group_rows,
        data_page_size=1 << 30,
        max_rows_per_page=row_group_rows,
        compression={**{name: "NONE" for name in addressed}, **{name: "ZSTD" for name in others}},
        use_dictionary=[name for name in others if name != IMAGE_ID],
        column_encoding={**{name: "PLAIN" for name in addressed}, IMAGE_ID: "DELTA_BINARY_PACKED"},
        write_statistics=False,
        write_page_checksum=True,
        store_schema=False,
    )
    return buffer.getvalue()


def _row_groups(data: bytes, table: pa.Table, addressed: dict[str, int]) -> list[dict[str, Any]]:
    metadata = pq.ParquetFile(io.BytesIO(data)).metadata
    values = {name: byte_rows(table[name], width) for name, width in addressed.items()}
    groups, start = [], 0
    for g in range(metadata.num_row_groups):
        group, entry = metadata.row_group(g), {}
        for c, name in enumerate(table.column_names):
            offset, size = _chunk_range(group.column(c))
            if name in addressed:
                num_bytes = group.num_rows * addressed[name]
                offset, size = offset + size - num_bytes, num_bytes
                # The arithmetic rests on how the writer lays pages out, so every part proves it.
                if data[offset : offset + size] != values[name][start : start + group.num_rows].tobytes():
                    raise RuntimeError(
                        f"the Parquet writer put column {name} where row-addressed reading does not look"
                    )
            digest = xxhash.xxh3_64_hexdigest(memoryview(data)[offset : offset + size])
            entry[name] = {"offset": offset, "bytes": size, "xxh3_64": digest}
        groups.append({"rows": group.num_rows, "columns": entry})
        start += group.num_rows
    return groups


def _chunk_range(column: Any) -> tuple[int, int]:
    """Where a column chunk starts, its dictionary included, and its bytes."""
    start = column.data_page_offset
    if column.dictionary_page_offset is not None:
        start = min(start, column.dictionary_page_offset)
    return start, column.total_compressed_size


QUARANTINE_SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.int64(), nullable=False),
        pa.field("uri", pa.string(), nullable=False),
        pa.field("stage", pa.string(), nullable=False),
        pa.field("kind", pa.string(), nullable=False),
        pa.field("message", pa.string(), nullable=False),
        pa.field("sha256", pa.string(), nullable=False),
    ]
)
DUPLICATES_SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.int64(), nullable=False),
        pa.field("first_image_id", pa.int64(), nullable=False),
        pa.field("sha256", pa.string(), nullable=False),
    ]
)


def encode_rows(rows: list[dict[str, Any]], schema: pa.Schema) -> bytes:
    """The bytes of a small Parquet file: the images of a shard that are unusable and why, or duplicates of earlier images."""
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), buffer, write_page_checksum=True, compression="NONE")
    return buffer.getvalue()
