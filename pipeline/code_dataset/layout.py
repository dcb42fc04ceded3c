"""Where the files of a code dataset are, and canonical JSON."""

import hashlib
import json
from typing import Any

from pipeline import storage

FORMAT = "tessera-code-dataset"
FORMAT_VERSION = 1


def canonical_json(value: Any) -> bytes:
    """The one JSON text of a value: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def sha256_hex(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def plan_path(root: str, plan_fingerprint: str) -> str:
    return storage.join(root, "plans", plan_fingerprint, "plan.parquet")


def receipts_path(root: str, plan_fingerprint: str) -> str:
    return storage.join(root, "receipts", plan_fingerprint)


def receipt_path(root: str, plan_fingerprint: str, shard: int) -> str:
    return storage.join(receipts_path(root, plan_fingerprint), f"{shard:05d}.json")


def content_path(kind: str, plan_fingerprint: str, shard: int, sha256: str) -> str:
    """Path, relative to the root, of a part (`data`) or a quarantine file (`quarantine`), named by its content."""
    return f"{kind}/{plan_fingerprint}/part-{shard:05d}-{sha256[:16]}.parquet"


def manifest_path(root: str, sha256: str) -> str:
    return storage.join(root, "manifests", f"{sha256}.json")


def version_path(root: str, version: int) -> str:
    return storage.join(root, "versions", f"{version:08d}.json")
