"""Garbage: what dead or losing attempts left behind, and the shards that a published version has replaced by parts."""

import time
from collections.abc import Iterable

from pipeline import storage
from pipeline.code_dataset.integrity import expected_files
from pipeline.code_dataset.layout import content_path, manifest_path, read_jsons
from pipeline.code_dataset.manifest import is_published, read_manifest, read_version

GRACE_SECONDS = 3600.0
RECEIPT_FILES = {"part": "shards", "quarantine": "quarantine"}  # entries of a receipt, and the folders that they lie in
CONTENT_FOLDERS = (*RECEIPT_FILES.values(), "data", "duplicates", "manifests")


def collect_garbage(root: str, grace_seconds: float = GRACE_SECONDS) -> list[str]:
    """Deletes what nothing refers to, nor ever will; returns the paths.

    Of a published dataset that is every file that its version does not rest on. Before that, it is what other attempts wrote of a
    shard that has its receipt: files are named by content, so a job may still refer to any other, however old. Temporary files go when
    they are older than `grace_seconds`.
    """
    garbage = _beside_version(root) if is_published(root) else _beside_receipts(root)
    garbage += storage.list_temporary_files(root, older_than=time.time() - grace_seconds)
    for path in garbage:
        storage.delete(path)
    return garbage


def _beside_version(root: str) -> list[str]:
    in_use = {path for path, _ in expected_files(root, read_manifest(root))}
    in_use.add(manifest_path(root, read_version(root)["manifest_sha256"]))
    return [path for path in _list(root, CONTENT_FOLDERS) if path not in in_use]


def _beside_receipts(root: str) -> list[str]:
    found = _list(root, RECEIPT_FILES.values())
    receipts = read_jsons(storage.list_files(storage.join(root, "receipts"), suffix=".json"))
    in_use = {storage.join(root, receipt[entry]["path"]) for receipt in receipts for entry in RECEIPT_FILES if receipt[entry]}
    of_finished = {
        _without_hash(storage.join(root, content_path(kind, receipt["plan_fp"], receipt["shard"], "")))
        for receipt in receipts
        for kind in RECEIPT_FILES.values()
    }
    return [path for path in found if _without_hash(path) in of_finished and path not in in_use]


def _list(root: str, folders: Iterable[str]) -> list[str]:
    return [path for folder in folders for path in storage.list_files(storage.join(root, folder))]


def _without_hash(path: str) -> str:
    return path.rpartition("-")[0]
