"""Where the files of a code dataset are, and canonical JSON."""

import hashlib
import json
from typing import Any

from pipeline import storage
from stages.errors import ArtefactError

FORMAT = "tessera-code-dataset"
FORMAT_VERSION = 1


def canonical_json(value: Any) -> bytes:
    """The one JSON text of a value: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def sha256_hex(data: bytes) -> str:
    """sha-256 as 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def read_json(path: str) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ArtefactError: the file is missing or holds something else.
    """
    try:
        content = json.loads(storage.read_bytes(path))
    except FileNotFoundError:
        raise ArtefactError(
            f"{path} is missing, but the code dataset needs it. Restore it, or tokenize anew."
        ) from None
    except ValueError as error:
        raise ArtefactError(
            f"{path} is damaged ({error}), but it must be JSON. Restore it, or tokenize anew."
        ) from None
    if not isinstance(content, dict):
        raise ArtefactError(f"{path} is damaged, but it must hold a JSON object. Restore it, or tokenize anew.")
    return content


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
