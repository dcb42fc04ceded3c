"""Checks a code dataset to the last byte: every file, every hash, every sum, and the rows as any Parquet reader sees them."""

import io
import json
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from pipeline import storage
from pipeline.code_dataset.codec import unpack
from pipeline.code_dataset.layout import plan_path, receipt_path, sha256_hex
from pipeline.code_dataset.parts import CODES
from pipeline.code_dataset.reader import read_manifest
from stages.errors import ArtefactError


def verify_code_dataset(root: str) -> list[str]:
    """Problems of the newest version; empty when it is sound."""
    try:
        manifest = read_manifest(root)
    except ArtefactError as error:
        return [str(error)]
    problems = _plan_problems(root, manifest) + _receipt_problems(root, manifest)
    for part in manifest["parts"]:
        problems += _content_problems(root, part) or _part_problems(root, part, manifest["codec"])
    for quarantine in manifest["quarantine"]:
        problems += _content_problems(root, quarantine) or _quarantine_problems(root, quarantine)
    return problems


def _plan_problems(root: str, manifest: dict[str, Any]) -> list[str]:
    path = plan_path(root, manifest["plan_fp"])
    try:
        data = storage.read_bytes(path)
        images = pq.read_table(io.BytesIO(data), page_checksum_verification=True)
    except (OSError, pa.ArrowInvalid) as error:
        return [f"{path} cannot be read: {error}"]
    if len(images) != manifest["counts"]["n_input"]:
        return [f"{path} has {len(images)} images, but the manifest counts {manifest['counts']['n_input']}"]
    return []


def _receipt_problems(root: str, manifest: dict[str, Any]) -> list[str]:
    problems = []
    by_path = {part["path"]: part for part in manifest["parts"]}
    for part in manifest["parts"]:
        shard = int(part["path"].split("/part-")[1].split("-")[0])
        path = receipt_path(root, manifest["plan_fp"], shard)
        try:
            receipt = json.loads(storage.read_bytes(path))
        except (FileNotFoundError, ValueError) as error:
            problems.append(f"{path} cannot be read: {error}")
            continue
        expected = {key: value for key, value in by_path[part["path"]].items() if key != "row_start"}
        if receipt.get("part") != expected:
            problems.append(f"{path} describes another part than the manifest")
    return problems


def _content_problems(root: str, entry: dict[str, Any]) -> list[str]:
    path = storage.join(root, entry["path"])
    try:
        data = storage.read_bytes(path)
    except FileNotFoundError:
        return [f"{path} is missing"]
    if sha256_hex(data) != entry["sha256"]:
        return [f"{path} has sha-256 {sha256_hex(data)}, expected {entry['sha256']}"]
    return []


def _part_problems(root: str, part: dict[str, Any], codec: dict[str, Any]) -> list[str]:
    path = storage.join(root, part["path"])
    data = storage.read_bytes(path)
    problems = []
    table = pq.read_table(io.BytesIO(data), page_checksum_verification=True)
    if table.num_rows != part["rows"]:
        problems.append(f"{path} has {table.num_rows} rows, expected {part['rows']}")
    for group in part["row_groups"]:
        for name, column in group["columns"].items():
            payload = data[column["offset"] : column["offset"] + column["bytes"]]
            if xxhash.xxh3_64_hexdigest(payload) != column["xxh3_64"]:
                problems.append(f"{path} has another xxh3_64 in column {name} than the manifest")
    packed = np.frombuffer(b"".join(table[CODES].to_pylist()), np.uint8).reshape(table.num_rows, codec["bytes_per_row"])
    largest = int(unpack(packed, codec["num_codes"], codec["bits"]).max(initial=0))
    if largest >= codec["codebook_size"]:
        problems.append(f"{path} holds code {largest}, but the codebook has {codec['codebook_size']} entries")
    return problems


def _quarantine_problems(root: str, quarantine: dict[str, Any]) -> list[str]:
    path = storage.join(root, quarantine["path"])
    rows = pq.read_table(io.BytesIO(storage.read_bytes(path)), page_checksum_verification=True).num_rows
    return [] if rows == quarantine["rows"] else [f"{path} has {rows} rows, expected {quarantine['rows']}"]
