"""Hashes of every file that a version rests on, compared with its manifest."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pipeline import storage
from pipeline.code_dataset.layout import (
    NUM_READERS,
    claim_of,
    claim_path,
    plan_path,
    probe_path,
    receipt_path,
    sha256_hex,
)


def expected_files(root: str, manifest: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(path, sha-256) of every file of a version but its manifest and version file."""
    plan_fp = manifest["plan_fp"]
    yield plan_path(root, plan_fp), manifest["plan_sha256"]
    if storage.exists(claim_path(root)):
        yield claim_path(root), sha256_hex(claim_of(plan_fp))
    if manifest.get("probe"):
        yield probe_path(root, plan_fp), manifest["probe"]["file_sha256"]
    for shard, digest in enumerate(manifest["receipts_sha256"]):
        yield receipt_path(root, plan_fp, shard), digest
    small = [*manifest["quarantine"], *([manifest["duplicates"]] if manifest["duplicates"] else [])]
    for file in [*small, *manifest["parts"]]:
        yield storage.join(root, file["path"]), file["sha256"]


def file_problems(root: str, manifest: dict[str, Any]) -> Iterator[str]:
    """A sentence for every file that is missing or has another hash than the manifest says."""
    with ThreadPoolExecutor(max_workers=NUM_READERS) as readers:
        checks = readers.map(lambda file: _problem(*file), expected_files(root, manifest))
        yield from filter(None, checks)


def size_problems(root: str, manifest: dict[str, Any]) -> Iterator[str]:
    """A sentence for every local part that is missing or of another size; parts on S3 are not asked for."""
    for part in manifest["parts"] if storage.is_local(root) else ():
        path = storage.join(root, part["path"])
        try:
            found = storage.size(path)
        except FileNotFoundError:
            yield f"{path} is missing, but the manifest lists it"
            continue
        if found != part["bytes"]:
            yield f"{path} has {found} bytes, but the manifest says {part['bytes']}"


def _problem(path: str, expected: str) -> str | None:
    try:
        found = sha256_hex(storage.read_bytes(path))
    except FileNotFoundError:
        return f"{path} is missing, but the manifest lists it"
    return None if found == expected else f"{path} is damaged: its sha-256 is {found}, but the manifest says {expected}"
