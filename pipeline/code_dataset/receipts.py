"""Receipts: a shard is done when its receipt exists. The first committer wins; what else was written is garbage."""

from collections import Counter
from typing import Any

import pyarrow as pa

from pipeline import storage
from pipeline.code_dataset.layout import (
    canonical_json,
    content_path,
    read_json,
    read_jsons,
    receipt_path,
    receipts_path,
    sha256_hex,
)
from pipeline.code_dataset.parts import QUARANTINE_SCHEMA, RowFormat, encode_part, encode_rows
from stages.errors import ArtefactError


def commit_shard(
    root: str,
    plan_fingerprint: str,
    shard: int,
    *,
    rows: pa.Table,
    quarantined: list[dict[str, Any]],
    row_format: RowFormat,
    num_views: int,
    encoder: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Writes a shard's part and quarantine file, then its receipt; returns the receipt that counts, ours or an earlier one.

    Args:
        root: of the dataset.
        plan_fingerprint: of the plan the shard belongs to.
        shard: its number.
        rows: of `row_format.shard_schema`, every view of each usable image, in order of (image, view).
        quarantined: rows of the quarantine file.
        row_format: of the shard's codes, as they come from the tokenizer.
        num_views: views per image.
        encoder: the machine and libraries that made the codes.
    """
    num_images = len(rows) // num_views
    part = quarantine = None
    if num_images:
        data, row_groups = encode_part(rows, row_format, row_format.row_group_rows())
        part = put_content(root, "shards", plan_fingerprint, shard, data)
        part |= {"rows": len(rows), "row_groups": row_groups}
    if quarantined:
        data = encode_rows(quarantined, QUARANTINE_SCHEMA)
        quarantine = put_content(root, "quarantine", plan_fingerprint, shard, data)
        quarantine["rows"] = len(quarantined)
    receipt = {
        "shard": shard,
        "plan_fp": plan_fingerprint,
        "part": part,
        "quarantine": quarantine,
        "counts": {
            "n_input": num_images + len(quarantined),
            "n_images": num_images,
            "n_quarantined": dict(Counter(row["kind"] for row in quarantined)),
        },
        "encoder": encoder or {},
    }
    path = receipt_path(root, plan_fingerprint, shard)
    return receipt if storage.put_if_absent(path, canonical_json(receipt)) else read_json(path)


def put_content(root: str, kind: str, plan_fingerprint: str, number: int, data: bytes) -> dict[str, Any]:
    """Stores a file under a name made of its content; returns its path below the root, its bytes and its sha-256."""
    digest = sha256_hex(data)
    path = content_path(kind, plan_fingerprint, number, digest)
    storage.put_if_absent(storage.join(root, path), data)
    return {"path": path, "bytes": len(data), "sha256": digest}


def finished_shards(root: str, plan_fingerprint: str) -> set[int]:
    """Shards with a receipt, from one listing."""
    paths = storage.list_files(receipts_path(root, plan_fingerprint), suffix=".json")
    return {int(path.split("/")[-1].removesuffix(".json")) for path in paths}


def read_receipts(root: str, plan_fingerprint: str, num_shards: int) -> list[dict[str, Any]]:
    """The receipts of shards 0 to num_shards - 1.

    Raises:
        ArtefactError: one is missing, damaged, or of another shard.
    """
    paths = [receipt_path(root, plan_fingerprint, shard) for shard in range(num_shards)]
    receipts = read_jsons(paths)
    for shard, (path, receipt) in enumerate(zip(paths, receipts)):
        if (receipt.get("shard"), receipt.get("plan_fp")) != (shard, plan_fingerprint):
            raise ArtefactError(f"{path} is a receipt of another shard or plan. Remove it, and run tokenize again.")
    return receipts
