"""Publishing: counts that must add up, a manifest named by its content, and one put-if-absent version file."""

import time
from collections import Counter
from typing import Any

import numpy as np
import xxhash

from pipeline import storage
from pipeline.code_dataset.codec import unpack
from pipeline.code_dataset.layout import (
    FORMAT,
    FORMAT_VERSION,
    canonical_json,
    manifest_path,
    plan_path,
    sha256_hex,
    version_path,
)
from pipeline.code_dataset.parts import CODES, IMAGE_ID, LABEL, VIEW, column_dtypes
from stages.errors import ArtefactError


def root_hash(parts: list[dict[str, Any]]) -> str:
    """A two-level hash tree: sha-256 over the sha-256 of each part's path and hash. Nothing of the attempt is in it."""
    leaves = [sha256_hex(f"{part['path']}:{part['sha256']}".encode()) for part in parts]
    return sha256_hex("".join(leaves).encode())


def total_counts(receipts: list[dict[str, Any]], num_views: int) -> dict[str, Any]:
    """Sums of the receipts' counts: n_input = n_images + quarantined + dropped, n_rows = n_images * num_views."""
    kinds: Counter[str] = Counter()
    for receipt in receipts:
        kinds.update(receipt["counts"]["n_quarantined"])
    num_images = sum(receipt["counts"]["n_images"] for receipt in receipts)
    return {
        "n_input": sum(receipt["counts"]["n_input"] for receipt in receipts),
        "n_images": num_images,
        "n_rows": num_images * num_views,
        "n_quarantined": dict(kinds),
        "n_dedup_dropped": 0,
    }


def counts_add_up(counts: dict[str, Any], num_views: int, parts: list[dict[str, Any]]) -> bool:
    """Whether every input and every row is accounted for."""
    used = counts["n_images"] + sum(counts["n_quarantined"].values()) + counts["n_dedup_dropped"]
    rows = sum(part["rows"] for part in parts)
    return counts["n_input"] == used and counts["n_rows"] == counts["n_images"] * num_views == rows


def publish(root: str, receipts: list[dict[str, Any]], description: dict[str, Any]) -> None:
    """Writes the manifest, then the version file that makes it the dataset's content. An earlier version file stays.

    Args:
        root: of the dataset.
        receipts: of every shard, in order.
        description: plan_fp, source, class_names, views, grid, tokenizer, preprocess, encode, codec.

    Raises:
        ArtefactError: a part is missing or damaged.
    """
    parts, row_start = [], 0
    for receipt in receipts:
        if receipt["part"] is not None:
            parts.append({**receipt["part"], "row_start": row_start})
            row_start += receipt["part"]["rows"]
    counts = total_counts(receipts, len(description["views"]))
    assert counts_add_up(counts, len(description["views"]), parts)
    manifest = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "version": 1,
        "parent": None,
        **description,
        "counts": counts,
        "columns": _columns(description),
        "plan_sha256": sha256_hex(storage.read_bytes(plan_path(root, description["plan_fp"]))),
        "receipts_sha256": [sha256_hex(canonical_json(receipt)) for receipt in receipts],
        "parts": parts,
        "quarantine": [receipt["quarantine"] for receipt in receipts if receipt["quarantine"] is not None],
        "stats": _statistics(root, parts, description["codec"]),
        "root_hash": root_hash(parts),
    }
    data = canonical_json(manifest)
    digest = sha256_hex(data)
    storage.put_if_absent(manifest_path(root, digest), data)
    version = {"manifest_sha256": digest, "parent": None, "root_hash": manifest["root_hash"], "created_at": time.time()}
    storage.put_if_absent(
        version_path(root, 1), canonical_json({**version, "sha256": sha256_hex(canonical_json(version))})
    )


def _columns(description: dict[str, Any]) -> list[dict[str, Any]]:
    codec = description["codec"]
    types = column_dtypes(codec["bytes_per_row"], bool(description["class_names"]))
    roles = {IMAGE_ID: "key", VIEW: "key", LABEL: "label", CODES: "codes"}
    columns = [{"name": name, "role": roles[name], "bytes": dtype.itemsize} for name, dtype in types.items()]
    columns[-1] |= {"bits": codec["bits"], "shape": description["grid"]}
    return columns


def _statistics(root: str, parts: list[dict[str, Any]], codec: dict[str, Any]) -> dict[str, Any]:
    """How often each code occurs, as a hash, with the number used and their entropy in bits per code."""
    histogram = np.zeros(codec["codebook_size"], dtype=np.int64)
    for part in parts:
        path = storage.join(root, part["path"])
        for group in part["row_groups"]:
            packed = _read_codes(path, group["columns"][CODES]).reshape(group["rows"], codec["bytes_per_row"])
            codes = unpack(packed, codec["num_codes"], codec["bits"])
            histogram += np.bincount(codes.ravel(), minlength=len(histogram))
    shares = histogram[histogram > 0] / max(1, histogram.sum())
    return {
        "used_codes": int((histogram > 0).sum()),
        "entropy_bits_per_code": float(-(shares * np.log2(shares)).sum()),
        "code_histogram_sha256": sha256_hex(histogram.astype("<i8").tobytes()),
    }


def _read_codes(path: str, column: dict[str, Any]) -> np.ndarray:
    try:
        payload = storage.read_range(path, column["offset"], column["bytes"])
    except FileNotFoundError:
        payload = b""
    if xxhash.xxh3_64_hexdigest(payload) != column["xxh3_64"]:
        raise ArtefactError(
            f"{path} is missing or damaged, but its receipt says it is finished. Remove the receipt and run again."
        )
    return np.frombuffer(payload, np.uint8)
