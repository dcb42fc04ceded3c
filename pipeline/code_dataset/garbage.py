"""Garbage: what dead or losing attempts left behind, and the shards that a published version has replaced by parts."""

import time

from pipeline import storage
from pipeline.code_dataset.integrity import expected_files
from pipeline.code_dataset.layout import (
    CONTENT_KINDS,
    CONTENT_NAME,
    MANIFEST_NAME,
    RECEIPT_NAME,
    TEMPORARY_NAME,
    content_path,
    manifest_path,
    named,
    read_jsons,
)
from pipeline.code_dataset.manifest import is_published, read_manifest, read_version

GRACE_SECONDS = 3600.0
RECEIPT_FILES = {"part": "shards", "quarantine": "quarantine"}  # entries of a receipt, and the folders that they lie in


def collect_garbage(root: str, grace_seconds: float = GRACE_SECONDS) -> list[str]:
    """Deletes what nothing refers to, nor ever will; returns the paths.

    Of a published dataset that is every part, shard, manifest, and file of quarantined images or duplicates that its version does not
    rest on. Before that, it is what other attempts wrote of a shard that has its receipt: files are named by content, so a job may
    still refer to any other, however old. Temporary files go when they are older than `grace_seconds`. Files whose names are none that
    the format gives stay: they may be what the user keeps in the same folder.
    """
    garbage = _beside_version(root) if is_published(root) else _beside_receipts(root)
    garbage += named(root, TEMPORARY_NAME, storage.list_temporary_files(root, older_than=time.time() - grace_seconds))
    for path in garbage:
        storage.delete(path)
    return garbage


def _beside_version(root: str) -> list[str]:
    in_use = {path for path, _ in expected_files(root, read_manifest(root))}
    in_use.add(manifest_path(root, read_version(root)["manifest_sha256"]))
    found = [path for kind in CONTENT_KINDS for path in _content_files(root, kind)]
    found += named(root, MANIFEST_NAME, storage.list_files(storage.join(root, "manifests")))
    return [path for path in found if path not in in_use]


def _beside_receipts(root: str) -> list[str]:
    found = [path for kind in RECEIPT_FILES.values() for path in _content_files(root, kind)]
    receipts = read_jsons(named(root, RECEIPT_NAME, storage.list_files(storage.join(root, "receipts"))))
    in_use = {storage.join(root, receipt[entry]["path"]) for receipt in receipts for entry in RECEIPT_FILES if receipt[entry]}
    of_finished = {
        _without_hash(storage.join(root, content_path(kind, receipt["plan_fp"], receipt["shard"], "")))
        for receipt in receipts
        for kind in RECEIPT_FILES.values()
    }
    return [path for path in found if _without_hash(path) in of_finished and path not in in_use]


def _content_files(root: str, kind: str) -> list[str]:
    return named(root, CONTENT_NAME, storage.list_files(storage.join(root, kind)))


def _without_hash(path: str) -> str:
    return path.rpartition("-")[0]
