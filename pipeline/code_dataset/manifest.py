"""The manifest of a version: finding it, checking it against its name, its format and its own sums."""

import json
from typing import Any

from pipeline import storage
from pipeline.code_dataset.layout import (
    FORMAT,
    FORMAT_VERSION,
    canonical_json,
    manifest_path,
    read_json,
    sha256_hex,
)
from pipeline.code_dataset.parts import RowFormat
from stages.errors import ArtefactError


def root_hash(parts: list[dict[str, Any]]) -> str:
    """A two-level hash tree: sha-256 over the sha-256 of each part's path and hash. Nothing of the attempt is in it."""
    leaves = [sha256_hex(f"{part['path']}:{part['sha256']}".encode()) for part in parts]
    return sha256_hex("".join(leaves).encode())


def counts_add_up(counts: dict[str, Any], num_views: int, parts: list[dict[str, Any]]) -> bool:
    """Whether every input and every row is accounted for."""
    used = counts["n_images"] + sum(counts["n_quarantined"].values()) + counts["n_dedup_dropped"]
    rows = sum(part["rows"] for part in parts)
    return counts["n_input"] == used and counts["n_rows"] == counts["n_images"] * num_views == rows


def row_format_of(manifest: dict[str, Any]) -> RowFormat:
    """The format of the rows of a manifest, or of the description that it is made of.

    `codec.remap` lists the codes in use where unused ones are left out.
    """
    codec = manifest["codec"]
    remap = codec.get("remap")
    return RowFormat(
        num_codes=codec["num_codes"],
        codebook_size=codec["codebook_size"] if remap is None else len(remap),
        has_labels=bool(manifest["class_names"]),
        conditions=tuple(manifest["conditions"]),
    )


def is_published(root: str) -> bool:
    """Whether the folder holds a version."""
    return bool(storage.list_files(storage.join(root, "versions"), suffix=".json"))


def read_version(root: str) -> dict[str, Any]:
    """The newest version file.

    Raises:
        ArtefactError: nothing is published here, or the file is damaged.
    """
    paths = storage.list_files(storage.join(root, "versions"), suffix=".json")
    if not paths:
        state = "an unfinished one" if storage.list_files(root) else "none"
        raise ArtefactError(
            f"codes.path is {root}, but there must be a published code dataset and there is {state}. Run tokenize first."
        )
    version = read_json(paths[-1])
    content = {key: value for key, value in version.items() if key != "sha256"}
    found = sha256_hex(canonical_json(content))
    if found != version.get("sha256"):
        raise ArtefactError(
            f"{paths[-1]} is damaged: its sha-256 is {found}, but it says {version.get('sha256')}. Restore it, or tokenize anew."
        )
    return version


def read_manifest(root: str) -> dict[str, Any]:
    """The manifest of the newest version.

    Raises:
        ArtefactError: missing, damaged or of an unknown format.
    """
    version = read_version(root)
    digest = version["manifest_sha256"]
    path = manifest_path(root, digest)
    try:
        data = storage.read_bytes(path)
    except FileNotFoundError:
        raise ArtefactError(
            f"{path} is missing, but the newest version refers to it. Restore it, or tokenize anew."
        ) from None
    if sha256_hex(data) != digest:
        raise ArtefactError(
            f"{path} is damaged: its sha-256 is {sha256_hex(data)}, but it must be its name. Restore it, or tokenize anew."
        )
    manifest = json.loads(data)
    if (manifest["format"], manifest["format_version"]) != (FORMAT, FORMAT_VERSION):
        raise ArtefactError(
            f"{root} has format {manifest['format']} {manifest['format_version']}, but this reader knows {FORMAT} "
            f"{FORMAT_VERSION}. Update Tessera, or tokenize anew."
        )
    _check_sums(path, manifest, version["root_hash"])
    return manifest


def _check_sums(path: str, manifest: dict[str, Any], version_root_hash: str) -> None:
    if not counts_add_up(manifest["counts"], len(manifest["views"]), manifest["parts"]):
        raise ArtefactError(f"{path} has counts {manifest['counts']}, but they must add up. Tokenize anew.")
    expected = root_hash(manifest["parts"])
    if not expected == manifest["root_hash"] == version_root_hash:
        raise ArtefactError(
            f"{path} has root hash {manifest['root_hash']} and its version {version_root_hash}, but its parts have "
            f"{expected}. Tokenize anew."
        )
    row_format, codec = row_format_of(manifest), manifest["codec"]
    if (row_format.bits, row_format.bytes_per_row) != (codec["bits"], codec["bytes_per_row"]):
        raise ArtefactError(
            f"{path} packs {codec['bits']} bits per code and {codec['bytes_per_row']} bytes per row, but a codebook of "
            f"{row_format.codebook_size} needs {row_format.bits} and {row_format.bytes_per_row}. Tokenize anew."
        )
