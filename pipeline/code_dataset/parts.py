"""Parts: legal Parquet in which row i of every column is a computable byte offset.

Required fixed-width columns, PLAIN, uncompressed, page checksums, one page per row group: the values of a column chunk are
then its last rows * width bytes. The offsets are verified against the values when a part is made.
"""

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from pipeline.code_dataset.codec import num_bits, pack

ROW_GROUP_ROWS = 16_384
CODES, IMAGE_ID, VIEW, LABEL = "codes", "image_id", "view", "label"


@dataclass(frozen=True)
class PartRows:
    """Rows of a part in order of (image, view).

    Attributes:
        codes: int64 (n, L).
        image_ids: int64 (n,).
        views: int32 (n,), indices into the manifest's views.
        labels: int32 (n,), -1 where an image has none; None for a dataset without classes.
    """

    codes: np.ndarray
    image_ids: np.ndarray
    views: np.ndarray
    labels: np.ndarray | None


def column_dtypes(bytes_per_row: int, has_labels: bool) -> dict[str, np.dtype]:
    """The columns of a part, in order, with the little-endian type of one value."""
    types: dict[str, np.dtype] = {IMAGE_ID: np.dtype("<i8"), VIEW: np.dtype("<i4")}
    if has_labels:
        types[LABEL] = np.dtype("<i4")
    return {**types, CODES: np.dtype(f"V{bytes_per_row}")}


def encode_part(rows: PartRows, codebook_size: int) -> tuple[bytes, list[dict[str, Any]]]:
    """The bytes of a part and, per row group, its rows and each column's payload offset, bytes and xxh3_64.

    Raises:
        ValueError: a code is outside [0, codebook_size).
    """
    if rows.codes.min() < 0 or rows.codes.max() >= codebook_size:
        raise ValueError(
            f"codes span [{rows.codes.min()}, {rows.codes.max()}], but the codebook has {codebook_size} entries"
        )
    packed = np.ascontiguousarray(pack(rows.codes, num_bits(codebook_size)))
    columns = {IMAGE_ID: rows.image_ids.astype("<i8"), VIEW: rows.views.astype("<i4")}
    if rows.labels is not None:
        columns[LABEL] = rows.labels.astype("<i4")
    columns[CODES] = packed.view(f"V{packed.shape[1]}")[:, 0]
    data = _write_parquet(columns)
    return data, _row_groups(data, columns)


def _write_parquet(columns: dict[str, np.ndarray]) -> bytes:
    arrays, fields = [], []
    for name, values in columns.items():
        kind = pa.binary(values.dtype.itemsize) if name == CODES else pa.from_numpy_dtype(values.dtype)
        arrays.append(pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(values.tobytes())]))
        fields.append(pa.field(name, kind, nullable=False))
    buffer = io.BytesIO()
    pq.write_table(
        pa.table(arrays, schema=pa.schema(fields)),
        buffer,
        row_group_size=ROW_GROUP_ROWS,
        data_page_size=1 << 30,
        max_rows_per_page=ROW_GROUP_ROWS,
        compression="NONE",
        use_dictionary=False,
        column_encoding={name: "PLAIN" for name in columns},
        write_statistics=False,
        write_page_checksum=True,
        store_schema=False,
    )
    return buffer.getvalue()


def _row_groups(data: bytes, columns: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    metadata = pq.ParquetFile(io.BytesIO(data)).metadata
    groups, start = [], 0
    for g in range(metadata.num_row_groups):
        group = metadata.row_group(g)
        entry: dict[str, Any] = {"rows": group.num_rows, "columns": {}}
        for c, (name, values) in enumerate(columns.items()):
            chunk = group.column(c)
            num_bytes = group.num_rows * values.dtype.itemsize
            offset = chunk.data_page_offset + chunk.total_compressed_size - num_bytes
            payload = data[offset : offset + num_bytes]
            # The arithmetic rests on how the writer lays pages out, so every part proves it.
            if payload != values[start : start + group.num_rows].tobytes():
                raise RuntimeError(
                    f"the Parquet writer did not put column {name} where row-addressed reading expects it"
                )
            entry["columns"][name] = {
                "offset": offset,
                "bytes": num_bytes,
                "xxh3_64": xxhash.xxh3_64_hexdigest(payload),
            }
        groups.append(entry)
        start += group.num_rows
    return groups


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


def encode_quarantine(rows: list[dict[str, Any]]) -> bytes:
    """The bytes of a quarantine file: per unusable image the stage, kind of fault, message and sha-256 of its bytes."""
    buffer = io.BytesIO()
    table = pa.Table.from_pylist(rows, schema=QUARANTINE_SCHEMA)
    pq.write_table(table, buffer, write_page_checksum=True, compression="NONE")
    return buffer.getvalue()
