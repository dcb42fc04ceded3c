"""Receipts: a shard is done when its receipt exists. The first committer wins; what else was written is garbage."""

from collections import Counter
from typing import Any

from pipeline import storage
from pipeline.code_dataset.layout import (
    canonical_json,
    content_path,
    read_json,
    receipt_path,
    receipts_path,
    sha256_hex,
)
from pipeline.code_dataset.parts import PartRows, encode_part, encode_quarantine
from stages.errors import ArtefactError


def commit_shard(
    root: str,
    plan_fingerprint: str,
    shard: int,
    *,
    rows: PartRows,
    quarantined: list[dict[str, Any]],
    codebook_size: int,
    num_views: int,
) -> dict[str, Any]:
    """Writes a shard's part and quarantine file, then its receipt; returns the receipt that counts, ours or an earlier one.

    Args:
        root: of the dataset.
        plan_fingerprint: of the plan the shard belongs to.
        shard: its number.
        rows: of the images that could be used, every view of each.
        quarantined: rows of the quarantine file.
        codebook_size: of the tokenizer.
        num_views: views per image.

    Raises:
        ValueError: a code is outside [0, codebook_size).
    """
    num_images = len(rows.image_ids) // num_views
    part = quarantine = None
    if num_images:
        data, row_groups = encode_part(rows, codebook_size)
        part = _put_content(root, "data", plan_fingerprint, shard, data)
        part |= {"rows": len(rows.image_ids), "row_groups": row_groups}
    if quarantined:
        quarantine = _put_content(root, "quarantine", plan_fingerprint, shard, encode_quarantine(quarantined))
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
    }
    path = receipt_path(root, plan_fingerprint, shard)
    return receipt if storage.put_if_absent(path, canonical_json(receipt)) else read_json(path)


def _put_content(root: str, kind: str, plan_fingerprint: str, shard: int, data: bytes) -> dict[str, Any]:
    digest = sha256_hex(data)
    path = content_path(kind, plan_fingerprint, shard, digest)
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
    receipts = []
    for shard in range(num_shards):
        path = receipt_path(root, plan_fingerprint, shard)
        receipt = read_json(path)
        if (receipt.get("shard"), receipt.get("plan_fp")) != (shard, plan_fingerprint):
            raise ArtefactError(f"{path} is a receipt of another shard or plan. Remove it, and run tokenize again.")
        receipts.append(receipt)
    return receipts
