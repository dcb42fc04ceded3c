"""Garbage: what dead or losing attempts left behind, and the shards that a published version has replaced by parts."""

import time

from pipeline import storage
from pipeline.code_dataset.integrity import expected_files
from pipeline.code_dataset.layout import manifest_path, read_json
from pipeline.code_dataset.manifest import is_published, read_manifest, read_version

GRACE_SECONDS = 3600.0
CONTENT_FOLDERS = ("shards", "data", "quarantine", "duplicates", "manifests")


def collect_garbage(root: str, grace_seconds: float = GRACE_SECONDS) -> list[str]:
    """Deletes what nothing refers to; returns the paths.

    Of a published dataset that is every file that its version does not rest on. Before that, a file without a receipt may
    belong to a job that is about to write one, so only files older than `grace_seconds` go. The same holds for temporary files.
    """
    published = is_published(root)
    in_use = _files_of_version(root) if published else _files_of_receipts(root)
    newest = time.time() - (0.0 if published else grace_seconds)
    garbage = [
        path
        for folder in CONTENT_FOLDERS
        for path in storage.list_files(storage.join(root, folder))
        if path not in in_use and storage.modified_time(path) <= newest
    ]
    garbage += storage.list_temporary_files(root, older_than=time.time() - grace_seconds)
    for path in garbage:
        storage.delete(path)
    return garbage


def _files_of_version(root: str) -> set[str]:
    manifest = read_manifest(root)
    files = {path for path, _ in expected_files(root, manifest)}
    return files | {manifest_path(root, read_version(root)["manifest_sha256"])}


def _files_of_receipts(root: str) -> set[str]:
    receipts = map(read_json, storage.list_files(storage.join(root, "receipts"), suffix=".json"))
    entries = [receipt[kind] for receipt in receipts for kind in ("part", "quarantine")]
    return {storage.join(root, entry["path"]) for entry in entries if entry is not None}
