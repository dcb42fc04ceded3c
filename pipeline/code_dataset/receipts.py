"""Receipts: a shard is done when its receipt exists. The first committer wins; whatever else was written is garbage nobody refers to."""

import json
from typing import Any

from pipeline import storage
from pipeline.code_dataset.layout import canonical_json, content_path, receipt_path, receipts_path, sha256_hex
from pipeline.code_dataset.parts import PartRows, encode_part, encode_quarantine


def commit_shard(
    root: str, plan_fingerprint: str, shard: int, rows: PartRows, quarantined: list[dict[str, Any]], bits: int, num_views: int
) -> dict[str, Any]:
    """Writes a shard's part and quarantine file, then its receipt; returns the receipt that counts, ours or an earlier one.

    Args:
        rows: of the images that could be used, every view of each.
        quarantined: rows of the quarantine file.
        bits: per code.
        num_views: views per image.
    """
    num_images = len(rows.image_ids) // num_views
    kinds: dict[str, int] = {}
    for row in quarantined:
        kinds[row["kind"]] = kinds.get(row["kind"], 0) + 1
    part = quarantine = None
    if num_images:
        data, row_groups = encode_part(rows, bits)
        part = {**_put_content(root, "data", plan_fingerprint, shard, data), "rows": len(rows.image_ids), "row_groups": row_groups}
    if quarantined:
        quarantine = _put_content(root, "quarantine", plan_fingerprint, shard, encode_quarantine(quarantined))
        quarantine["rows"] = len(quarantined)
    receipt = {
        "shard": shard,
        "plan_fp": plan_fingerprint,
        "part": part,
        "quarantine": quarantine,
        "counts": {"n_input": num_images + len(quarantined), "n_images": num_images, "n_quarantined": kinds},
    }
    path = receipt_path(root, plan_fingerprint, shard)
    return receipt if storage.put_if_absent(path, canonical_json(receipt)) else json.loads(storage.read_bytes(path))


def _put_content(root: str, kind: str, plan_fingerprint: str, shard: int, data: bytes) -> dict[str, Any]:
    digest = sha256_hex(data)
    path = content_path(kind, plan_fingerprint, shard, digest)
    storage.put_if_absent(storage.join(root, path), data)
    return {"path": path, "bytes": len(data), "sha256": digest}


def finished_shards(root: str, plan_fingerprint: str) -> set[int]:
    """Shards with a receipt, from one listing."""
    paths = storage.list_files(receipts_path(root, plan_fingerprint), suffix=".json")
    return {int(path.split("/")[-1].removesuffix(".json")) for path in paths}


def read_receipts(root: str, plan_fingerprint: str) -> list[dict[str, Any]]:
    """Every receipt of a plan in order of shard."""
    paths = storage.list_files(receipts_path(root, plan_fingerprint), suffix=".json")
    return sorted((json.loads(storage.read_bytes(path)) for path in paths), key=lambda receipt: receipt["shard"])
