"""Publishing: counts that must add up, a manifest named by its content, and one put-if-absent version file."""

import time
from typing import Any

import numpy as np

from pipeline import storage
from pipeline.code_dataset.layout import FORMAT, FORMAT_VERSION, canonical_json, manifest_path, sha256_hex, version_path
from pipeline.code_dataset.parts import CODES, column_dtypes
from pipeline.code_dataset.codec import unpack


def root_hash(parts: list[dict[str, Any]]) -> str:
    """A two-level hash tree over the parts: sha-256 of the parts' (path, sha-256) in order. Nothing of the attempt is in it."""
    leaves = [sha256_hex(f"{part['path']}:{part['sha256']}".encode()) for part in parts]
    return sha256_hex("".join(leaves).encode())


def total_counts(receipts: list[dict[str, Any]], num_views: int) -> dict[str, Any]:
    """Sums of the receipts' counts: n_input = n_images + quarantined + dropped, n_rows = n_images * views."""
    kinds: dict[str, int] = {}
    for receipt in receipts:
        for kind, count in receipt["counts"]["n_quarantined"].items():
            kinds[kind] = kinds.get(kind, 0) + count
    num_images = sum(receipt["counts"]["n_images"] for receipt in receipts)
    return {
        "n_input": sum(receipt["counts"]["n_input"] for receipt in receipts),
        "n_images": num_images,
        "n_rows": num_images * num_views,
        "n_quarantined": kinds,
        "n_dedup_dropped": 0,
    }


def counts_add_up(counts: dict[str, Any], num_views: int) -> bool:
    """Whether every input is accounted for."""
    used = counts["n_images"] + sum(counts["n_quarantined"].values()) + counts["n_dedup_dropped"]
    return counts["n_input"] == used and counts["n_rows"] == counts["n_images"] * num_views


def publish(root: str, receipts: list[dict[str, Any]], description: dict[str, Any]) -> dict[str, Any]:
    """Writes the manifest and the version file; returns the manifest of the version that counts.

    Args:
        root: of the dataset.
        receipts: of every shard, in order.
        description: plan_fp, source, tokenizer, preprocess, codec, class_names, views, grid.
    """
    parts, row_start = [], 0
    for receipt in receipts:
        if receipt["part"] is not None:
            parts.append({**receipt["part"], "row_start": row_start})
            row_start += receipt["part"]["rows"]
    counts = total_counts(receipts, len(description["views"]))
    assert counts_add_up(counts, len(description["views"])) and counts["n_rows"] == row_start
    manifest = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "version": 1,
        "parent": None,
        **description,
        "counts": counts,
        "columns": _columns(description),
        "parts": parts,
        "quarantine": [receipt["quarantine"] for receipt in receipts if receipt["quarantine"] is not None],
        "stats": _statistics(root, parts, description["codec"]),
        "root_hash": root_hash(parts),
    }
    data = canonical_json(manifest)
    digest = sha256_hex(data)
    storage.put_if_absent(manifest_path(root, digest), data)
    version = {"manifest_sha256": digest, "parent": None, "root_hash": manifest["root_hash"], "created_at": time.time()}
    storage.put_if_absent(version_path(root, 1), canonical_json(version))
    return manifest


def _columns(description: dict[str, Any]) -> list[dict[str, Any]]:
    codec = description["codec"]
    types = column_dtypes(codec["bytes_per_row"], bool(description["class_names"]))
    roles = {"image_id": "key", "view": "key", "label": "label", CODES: "codes"}
    columns = [{"name": name, "role": roles[name], "bytes": dtype.itemsize} for name, dtype in types.items()]
    columns[-1] |= {"bits": codec["bits"], "shape": description["grid"]}
    return columns


def _statistics(root: str, parts: list[dict[str, Any]], codec: dict[str, Any]) -> dict[str, Any]:
    """How often each code occurs, as a hash, with the number used and their entropy in bits per code."""
    histogram = np.zeros(codec["codebook_size"], dtype=np.int64)
    for part in parts:
        for group in part["row_groups"]:
            column = group["columns"][CODES]
            payload = storage.read_range(storage.join(root, part["path"]), column["offset"], column["bytes"])
            packed = np.frombuffer(payload, np.uint8).reshape(group["rows"], codec["bytes_per_row"])
            histogram += np.bincount(unpack(packed, codec["num_codes"], codec["bits"]).ravel(), minlength=len(histogram))
    shares = histogram[histogram > 0] / max(1, histogram.sum())
    return {
        "used_codes": int((histogram > 0).sum()),
        "entropy_bits_per_code": float(-(shares * np.log2(shares)).sum()),
        "code_histogram_sha256": sha256_hex(histogram.astype("<i8").tobytes()),
    }
