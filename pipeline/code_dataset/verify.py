"""Checks a code dataset to the last byte: every file, every hash, every sum, and the rows as any Parquet reader sees them."""

import io
from collections import Counter
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import xxhash

from pipeline import storage
from pipeline.code_dataset.codec import unpack
from pipeline.code_dataset.layout import plan_path, receipt_path, sha256_hex
from pipeline.code_dataset.parts import CODES
from pipeline.code_dataset.plan import read_plan
from pipeline.code_dataset.reader import read_manifest
from stages.errors import ArtefactError


def verify_code_dataset(root: str) -> list[str]:
    """Problems of the newest version, each naming a file; empty when it is sound."""
    try:
        manifest = read_manifest(root)
    except ArtefactError as error:
        return [str(error)]
    problems = _plan_problems(root, manifest) + _receipt_problems(root, manifest)
    for part in manifest["parts"]:
        path = storage.join(root, part["path"])
        problems += _hash_problems(path, part["sha256"]) or _part_problems(path, part, manifest["codec"])
    kinds: Counter[str] = Counter()
    for quarantine in manifest["quarantine"]:
        path = storage.join(root, quarantine["path"])
        problems += _hash_problems(path, quarantine["sha256"]) or _quarantine_problems(path, quarantine, kinds)
    if not problems and kinds != Counter(manifest["counts"]["n_quarantined"]):
        problems.append(
            f"{root} has quarantined {dict(kinds)}, but its manifest counts {manifest['counts']['n_quarantined']}"
        )
    return problems


def _hash_problems(path: str, expected: str) -> list[str]:
    try:
        found = sha256_hex(storage.read_bytes(path))
    except FileNotFoundError:
        return [f"{path} is missing"]
    return [] if found == expected else [f"{path} has sha-256 {found}, expected {expected}"]


def _plan_problems(root: str, manifest: dict[str, Any]) -> list[str]:
    path = plan_path(root, manifest["plan_fp"])
    problems = _hash_problems(path, manifest["plan_sha256"])
    if problems:
        return problems
    try:
        plan = read_plan(root, manifest["plan_fp"])
    except ArtefactError as error:
        return [str(error)]
    expected = (manifest["counts"]["n_input"], len(manifest["receipts_sha256"]))
    if (len(plan.images), plan.num_shards) != expected:
        return [
            f"{path} has {len(plan.images)} images in {plan.num_shards} shards, expected {expected[0]} in {expected[1]}"
        ]
    return []


def _receipt_problems(root: str, manifest: dict[str, Any]) -> list[str]:
    problems = []
    for shard, expected in enumerate(manifest["receipts_sha256"]):
        problems += _hash_problems(receipt_path(root, manifest["plan_fp"], shard), expected)
    return problems


def _part_problems(path: str, part: dict[str, Any], codec: dict[str, Any]) -> list[str]:
    data = storage.read_bytes(path)
    problems = []
    for group in part["row_groups"]:
        for name, column in group["columns"].items():
            found = xxhash.xxh3_64_hexdigest(data[column["offset"] : column["offset"] + column["bytes"]])
            if found != column["xxh3_64"]:
                problems.append(f"{path} has xxh3_64 {found} in column {name}, expected {column['xxh3_64']}")
    table = pq.read_table(io.BytesIO(data), page_checksum_verification=True)
    if table.num_rows != part["rows"]:
        return [*problems, f"{path} has {table.num_rows} rows, expected {part['rows']}"]
    packed = np.frombuffer(b"".join(table[CODES].to_pylist()), np.uint8).reshape(table.num_rows, codec["bytes_per_row"])
    largest = int(unpack(packed, codec["num_codes"], codec["bits"]).max(initial=0))
    if largest >= codec["codebook_size"]:
        problems.append(f"{path} holds code {largest}, but the codebook has {codec['codebook_size']} entries")
    return problems


def _quarantine_problems(path: str, quarantine: dict[str, Any], kinds: Counter[str]) -> list[str]:
    table = pq.read_table(io.BytesIO(storage.read_bytes(path)), page_checksum_verification=True)
    kinds.update(table["kind"].to_pylist())
    return [] if len(table) == quarantine["rows"] else [f"{path} has {len(table)} rows, expected {quarantine['rows']}"]
