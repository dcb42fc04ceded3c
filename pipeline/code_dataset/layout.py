"""Where the files of a code dataset are, what their names look like, and canonical JSON."""

import hashlib
import json
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pipeline import storage
from stages.errors import ArtefactError
from stages.files import TEMPORARY

FORMAT = "tessera-code-dataset"
FORMAT_VERSION = 1
NUM_READERS = 8

CONTENT_KINDS = ("data", "shards", "quarantine", "duplicates")  # of `content_path`
SHA256 = "[0-9a-f]{64}"
# Paths below the root, as the functions below make them.
CONTENT_NAME = re.compile(rf"({'|'.join(CONTENT_KINDS)})/{SHA256}/part-[0-9]{{5,}}-[0-9a-f]{{16}}\.parquet")
MANIFEST_NAME = re.compile(rf"manifests/{SHA256}\.json")
RECEIPT_NAME = re.compile(rf"receipts/{SHA256}/[0-9]{{5,}}\.json")
TEMPORARY_NAME = re.compile(
    rf"((({'|'.join(CONTENT_KINDS)}|plans|receipts)/{SHA256}|plans|manifests|versions)/)?{re.escape(TEMPORARY)}[0-9a-f]{{32}}"
)


def canonical_json(value: Any) -> bytes:
    """The one JSON text of a value: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def sha256_hex(data: bytes) -> str:
    """sha-256 as 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def read_json(path: str) -> dict[str, Any]:
    """A JSON object in its canonical text: no other byte may mean the same, or a flipped one could go unnoticed.

    Raises:
        ArtefactError: the file is missing or holds something else.
    """
    try:
        data = storage.read_bytes(path)
        content = json.loads(data)
        is_canonical = canonical_json(content) == data
    except FileNotFoundError:
        raise ArtefactError(
            f"{path} is missing, but the code dataset needs it. Restore it, or tokenize anew."
        ) from None
    except ValueError as error:
        raise ArtefactError(
            f"{path} is damaged ({error}), but it must be JSON. Restore it, or tokenize anew."
        ) from None
    if not isinstance(content, dict) or not is_canonical:
        raise ArtefactError(
            f"{path} is damaged, but it must hold a JSON object in canonical form. Restore it, or tokenize anew."
        )
    return content


def read_jsons(paths: list[str]) -> list[dict[str, Any]]:
    """JSON objects of many files, read side by side. Raises ArtefactError like `read_json`."""
    with ThreadPoolExecutor(max_workers=NUM_READERS) as readers:
        return list(readers.map(read_json, paths))


def named(root: str, name: re.Pattern[str], paths: Iterable[str]) -> list[str]:
    """Those of the paths of files below a root that have such a name; whatever else lies there belongs to someone else."""
    return [path for path in paths if name.fullmatch(path.removeprefix(storage.join(root, "")))]


def plan_path(root: str, plan_fingerprint: str) -> str:
    return storage.join(root, "plans", plan_fingerprint, "plan.parquet")


def claim_path(root: str) -> str:
    """The file that says whose plan's folder this is. Folders of earlier versions have none."""
    return storage.join(root, "plans", "claim.json")


def claim_of(plan_fingerprint: str) -> bytes:
    return canonical_json({"plan_fp": plan_fingerprint})


def receipts_path(root: str, plan_fingerprint: str) -> str:
    return storage.join(root, "receipts", plan_fingerprint)


def receipt_path(root: str, plan_fingerprint: str, shard: int) -> str:
    return storage.join(receipts_path(root, plan_fingerprint), f"{shard:05d}.json")


def content_path(kind: str, plan_fingerprint: str, number: int, sha256: str) -> str:
    """Path below the root of a file that is named by its content.

    Kinds: `shards` (rows of one shard, until they are published), `data` (parts of a published version), `quarantine`,
    `duplicates`.
    """
    return f"{kind}/{plan_fingerprint}/part-{number:05d}-{sha256[:16]}.parquet"


def probe_path(root: str, plan_fingerprint: str) -> str:
    return storage.join(root, "plans", plan_fingerprint, "probe.json")


def manifest_path(root: str, sha256: str) -> str:
    return storage.join(root, "manifests", f"{sha256}.json")


def version_path(root: str, version: int) -> str:
    return storage.join(root, "versions", f"{version:08d}.json")
