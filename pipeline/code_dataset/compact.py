"""From many small shards to parts of at most 98 MB: duplicates found, unused codebook entries left out, rows in plan order.

Both steps work shard by shard or part by part and depend on nothing else, so a caller may spread them over machines.
"""

import io
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.code_dataset.codec import pack, unpack
from pipeline.code_dataset.layout import sha256_hex
from pipeline.code_dataset.parts import (
    CODES,
    DESCRIBED,
    IMAGE_ID,
    SOURCE_SHA256,
    RowFormat,
    byte_column,
    byte_rows,
    encode_part,
)
from pipeline.code_dataset.receipts import put_content
from stages.errors import ArtefactError

MapFunction = Callable[[Callable[[Any], Any], Sequence[Any]], Iterable[Any]]  # like `map`: results in order

MAX_PART_BYTES = 98_000_000
DESCRIBED_BYTES_PER_ROW = sum(-(-kind.bit_width // 8) for kind in DESCRIBED.values())  # before compression


@dataclass(frozen=True)
class Survey:
    """What is known of a shard's images before anything is published: ids int64 (n,), sha-256 of their bytes, codes in use."""

    image_ids: np.ndarray
    sha256: list[bytes]
    is_used: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Compaction:
    """How shards become the parts of a version.

    Attributes:
        root, plan_fp: of the dataset.
        shards: parts of the shards, as in their receipts, in order.
        shard_starts: row at which each shard's rows start in the version, and at the end the number of rows.
        stored: format of the shards.
        published: format of the parts; its codebook is smaller if unused entries are left out.
        original: uint16, the code that each published code stands for; None if they are the same.
        dropped: ids of images that are left out.
        row_group_rows: rows per row group, a power of two.
        part_starts: like shard_starts, for the parts.
    """

    root: str
    plan_fp: str
    shards: tuple[dict[str, Any], ...]
    shard_starts: np.ndarray
    stored: RowFormat
    published: RowFormat
    original: np.ndarray | None
    dropped: frozenset[int]
    row_group_rows: int
    part_starts: np.ndarray


def survey_shards(
    root: str, shards: Sequence[dict[str, Any]], row_format: RowFormat, num_views: int, run: MapFunction = map
) -> list[Survey]:
    """One survey per shard, in order."""
    return list(run(partial(survey_shard, root, row_format, num_views), shards))


def survey_shard(root: str, row_format: RowFormat, num_views: int, shard: dict[str, Any]) -> Survey:
    """Reads one shard's part. Raises ArtefactError if it is missing or damaged."""
    table = read_shard(root, shard)
    images = table.take(np.arange(0, len(table), num_views))
    codes = unpack(byte_rows(table[CODES], row_format.bytes_per_row), row_format.num_codes, row_format.bits)
    is_used = np.zeros(row_format.codebook_size, dtype=bool)
    is_used[codes] = True
    return Survey(images[IMAGE_ID].to_numpy(), images[SOURCE_SHA256].to_pylist(), is_used)


def find_duplicates(surveys: Sequence[Survey]) -> list[dict[str, Any]]:
    """Images whose bytes are those of an earlier one in plan order; rows of DUPLICATES_SCHEMA."""
    first: dict[bytes, int] = {}
    duplicates = []
    for survey in surveys:
        for image_id, digest in zip(survey.image_ids.tolist(), survey.sha256):
            earlier = first.setdefault(digest, image_id)
            if earlier != image_id:
                duplicates.append({"image_id": image_id, "first_image_id": earlier, "sha256": digest.hex()})
    return duplicates


def plan_compaction(
    root: str,
    plan_fp: str,
    shards: Sequence[dict[str, Any]],
    surveys: Sequence[Survey],
    stored: RowFormat,
    *,
    num_views: int,
    dropped: frozenset[int],
    remap_unused: bool,
    row_group_rows: int | None,
) -> Compaction:
    """How these shards become parts: see `Compaction`, and `pipeline.code_dataset.publish.publish` for the choices."""
    kept = [num_views * sum(i not in dropped for i in survey.image_ids.tolist()) for survey in surveys]
    original = None
    if remap_unused:
        original = np.flatnonzero(np.any([survey.is_used for survey in surveys], axis=0)).astype(np.uint16)
    published = stored if original is None else stored.with_codebook_size(len(original))
    group_rows = row_group_rows or published.row_group_rows()
    return Compaction(
        root=root,
        plan_fp=plan_fp,
        shards=tuple(shards),
        shard_starts=np.array([0, *itertools.accumulate(kept)]),
        stored=stored,
        published=published,
        original=original,
        dropped=dropped,
        row_group_rows=group_rows,
        part_starts=part_bounds(sum(kept), group_rows, file_bytes_per_row(published)),
    )


def file_bytes_per_row(row_format: RowFormat) -> int:
    """Bytes of a row in a part at most. What describes it is counted before compression: all that is known whatever the shards are."""
    return sum(row_format.addressed.values()) + DESCRIBED_BYTES_PER_ROW


def part_bounds(num_rows: int, row_group_rows: int, bytes_per_row: float) -> np.ndarray:
    """Rows at which parts start, and at the end `num_rows`: whole row groups, spread evenly, at most 98 MB each or one row group."""
    num_groups = -(-num_rows // row_group_rows)
    most = max(1, int(MAX_PART_BYTES // (row_group_rows * bytes_per_row)))
    num_parts = -(-num_groups // most)
    groups = np.arange(num_parts + 1) * num_groups // num_parts
    return np.minimum(groups * row_group_rows, num_rows)


def write_parts(compaction: Compaction, run: MapFunction = map) -> tuple[list[dict[str, Any]], np.ndarray]:
    """Writes every part; returns their manifest entries, and how often each original code occurs, int64 (codebook_size,)."""
    numbers = range(len(compaction.part_starts) - 1)
    results = list(run(partial(write_part, compaction), numbers))
    histogram = sum((counts for _, counts in results), start=np.zeros(compaction.stored.codebook_size, np.int64))
    return [entry for entry, _ in results], histogram


def write_part(compaction: Compaction, number: int) -> tuple[dict[str, Any], np.ndarray]:
    """Writes one part; returns its manifest entry and its code histogram."""
    start, stop = compaction.part_starts[number : number + 2].tolist()
    table = _rows_between(compaction, start, stop)
    stored, published = compaction.stored, compaction.published
    codes = unpack(byte_rows(table[CODES], stored.bytes_per_row), stored.num_codes, stored.bits)
    histogram = np.bincount(codes.ravel(), minlength=stored.codebook_size)
    if compaction.original is not None:
        dense = np.zeros(stored.codebook_size, np.uint16)
        dense[compaction.original] = np.arange(len(compaction.original))
        column = pa.chunked_array([byte_column(pack(dense[codes], published.bits))])
        table = table.set_column(table.column_names.index(CODES), published.schema.field(CODES), column)
    data, row_groups = encode_part(table, published, compaction.row_group_rows)
    entry = put_content(compaction.root, "data", compaction.plan_fp, number, data)
    return {**entry, "rows": stop - start, "row_start": start, "row_groups": row_groups}, histogram


def _rows_between(compaction: Compaction, start: int, stop: int) -> pa.Table:
    """Published rows [start, stop), as they are stored in the shards."""
    starts = compaction.shard_starts
    first, last = np.searchsorted(starts, [start, stop - 1], side="right") - 1
    tables = []
    for shard in range(first, last + 1):
        table = read_shard(compaction.root, compaction.shards[shard])
        if compaction.dropped:
            is_dropped = pc.is_in(table[IMAGE_ID], pa.array(sorted(compaction.dropped), pa.int64()))
            table = table.filter(pc.invert(is_dropped))
        begin, end = max(start - starts[shard], 0), min(stop, starts[shard + 1]) - starts[shard]
        tables.append(table.slice(begin, end - begin).drop_columns([SOURCE_SHA256]))
    return pa.concat_tables(tables).combine_chunks()


def read_shard(root: str, shard: dict[str, Any]) -> pa.Table:
    """Rows of a shard's part.

    Raises:
        ArtefactError: it is missing or damaged.
    """
    path = storage.join(root, shard["path"])
    try:
        data = storage.read_bytes(path)
    except FileNotFoundError:
        data = b""
    if sha256_hex(data) != shard["sha256"]:
        raise ArtefactError(
            f"{path} is missing or damaged, but its receipt says it is finished. Remove the receipt and run again."
        )
    return pq.read_table(io.BytesIO(data))
