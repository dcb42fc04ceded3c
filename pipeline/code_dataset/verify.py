"""Checks a code dataset to the last byte: every file, every hash, every sum, and the rows as any Parquet reader sees them."""

import io
from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from pipeline import storage
from pipeline.code_dataset.codec import unpack
from pipeline.code_dataset.integrity import file_problems
from pipeline.code_dataset.manifest import read_manifest, row_format_of
from pipeline.code_dataset.parts import CODES, IMAGE_ID, LABEL, VIEW, byte_rows
from pipeline.code_dataset.plan import read_plan
from stages.errors import ArtefactError


def verify_code_dataset(root: str) -> list[str]:
    """Problems of the newest version, each naming a file; empty when it is sound."""
    try:
        manifest = read_manifest(root)
        problems = list(file_problems(root, manifest))
        return problems or _content_problems(root, manifest)
    except ArtefactError as error:
        return [str(error)]


def _content_problems(root: str, manifest: dict[str, Any]) -> list[str]:
    """What is wrong with files whose hashes are right: a manifest that does not say what they hold."""
    plan = read_plan(root, manifest["plan_fp"])
    counts, problems = manifest["counts"], []
    expected = (counts["n_input"], len(manifest["receipts_sha256"]))
    if (len(plan.images), plan.num_shards) != expected:
        problems.append(
            f"{root} has a plan of {len(plan.images)} images in {plan.num_shards} shards, but its manifest says {expected[0]} "
            f"in {expected[1]}"
        )
    quarantined = [row for file in manifest["quarantine"] for row in _read(root, file).to_pylist()]
    kinds = Counter(row["kind"] for row in quarantined)
    if kinds != Counter(counts["n_quarantined"]):
        problems.append(f"{root} has quarantined {dict(kinds)}, but its manifest counts {counts['n_quarantined']}")
    duplicates = _read(root, manifest["duplicates"]).to_pylist() if manifest["duplicates"] else []
    left_out = {row[IMAGE_ID] for row in quarantined}
    if counts["n_dedup_dropped"]:
        left_out |= {row[IMAGE_ID] for row in duplicates}
    if len(duplicates) != counts["n_duplicates"]:
        problems.append(f"{root} lists {len(duplicates)} duplicates, but its manifest counts {counts['n_duplicates']}")
    images = plan.images.filter(~np.isin(plan.images[IMAGE_ID].to_numpy(), list(left_out)))
    if len(images) != counts["n_images"]:
        problems.append(
            f"{root} has a plan of {len(images)} usable images, but its manifest counts {counts['n_images']}"
        )
    problems += _layout_problems(root, manifest)
    if problems:
        return problems  # rows cannot be told apart
    for part in manifest["parts"]:
        problems += _part_problems(storage.join(root, part["path"]), part, manifest, images)
    return problems


def _layout_problems(root: str, manifest: dict[str, Any]) -> list[str]:
    """Parts whose rows or row groups do not follow each other, so that a shift would not find a row."""
    size, num_rows, start, problems = manifest["codec"]["row_group_rows"], manifest["counts"]["n_rows"], 0, []
    for part in manifest["parts"]:
        stop = start + part["rows"]
        groups = [min(size, num_rows - first) for first in range(start, stop, size)]
        if part["row_start"] != start or [group["rows"] for group in part["row_groups"]] != groups:
            problems.append(
                f"{storage.join(root, part['path'])} must hold rows {start} to {stop} in full row groups of {size}, but the "
                f"manifest says otherwise"
            )
        start = stop
    return problems


def _part_problems(path: str, part: dict[str, Any], manifest: dict[str, Any], images: pa.Table) -> list[str]:
    data = storage.read_bytes(path)
    problems = _chunk_problems(path, part, data)
    table = pq.read_table(io.BytesIO(data), page_checksum_verification=True)
    if table.num_rows != part["rows"]:
        return [*problems, f"{path} has {table.num_rows} rows, but the manifest says {part['rows']}"]
    row_format, num_views = row_format_of(manifest), len(manifest["views"])
    packed = byte_rows(table[CODES], row_format.bytes_per_row)
    largest = int(unpack(packed, row_format.num_codes, row_format.bits).max(initial=0))
    if largest >= row_format.codebook_size:
        problems.append(f"{path} holds code {largest}, but the codebook has {row_format.codebook_size} entries")
    rows = part["row_start"] + np.arange(table.num_rows)
    planned = images.take(rows // num_views)
    expected = {IMAGE_ID: planned[IMAGE_ID].to_numpy(), VIEW: rows % num_views}
    if row_format.has_labels:
        expected[LABEL] = planned[LABEL].fill_null(-1).to_numpy()
    for name, values in expected.items():
        is_wrong = table[name].to_numpy() != values
        if is_wrong.any():
            row = int(rows[is_wrong][0])
            problems.append(f"{path} has another {name} in row {row} than the plan")
    return problems


def _chunk_problems(path: str, part: dict[str, Any], data: bytes) -> list[str]:
    problems = []
    for group in part["row_groups"]:
        for name, column in group["columns"].items():
            found = xxhash.xxh3_64_hexdigest(memoryview(data)[column["offset"] : column["offset"] + column["bytes"]])
            if found != column["xxh3_64"]:
                problems.append(
                    f"{path} has xxh3_64 {found} in column {name}, but the manifest says {column['xxh3_64']}"
                )
    return problems


def _read(root: str, file: dict[str, Any]) -> pa.Table:
    return pq.read_table(io.BytesIO(storage.read_bytes(storage.join(root, file["path"]))))
