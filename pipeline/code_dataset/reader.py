"""Opens a published code dataset and reads rows by number."""

import json
import mmap
from typing import Any

import numpy as np

from pipeline import storage
from pipeline.code_dataset.codec import bytes_per_row, num_bits, unpack
from pipeline.code_dataset.layout import (
    FORMAT,
    FORMAT_VERSION,
    canonical_json,
    manifest_path,
    read_json,
    sha256_hex,
)
from pipeline.code_dataset.parts import CODES, IMAGE_ID, LABEL, VIEW, column_dtypes
from pipeline.code_dataset.publish import counts_add_up, root_hash
from stages.errors import ArtefactError


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
    """The manifest of the newest version, checked against its name, its format and its own sums.

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
            f"{FORMAT_VERSION}. Update Tessera."
        )
    if not counts_add_up(manifest["counts"], len(manifest["views"]), manifest["parts"]):
        raise ArtefactError(f"{path} has counts {manifest['counts']}, but they must add up. Tokenize anew.")
    expected = root_hash(manifest["parts"])
    if not expected == manifest["root_hash"] == version["root_hash"]:
        raise ArtefactError(
            f"{path} has root hash {manifest['root_hash']} and its version {version['root_hash']}, but its parts have "
            f"{expected}. Tokenize anew."
        )
    return manifest


class CodeDataset:
    """A published code dataset. Rows are numbered in order of (image, view): row = image * num_views + view.

    Attributes:
        path, manifest, root_hash, tokenizer_fingerprint: identity.
        num_rows, num_images, num_views, num_codes, grid, codebook_size, bytes_per_row, class_names: shape.
    """

    def __init__(self, path: str, manifest: dict[str, Any]):
        self.path, self.manifest = path, manifest
        self.root_hash: str = manifest["root_hash"]
        self.tokenizer_fingerprint: str = manifest["tokenizer"]["fingerprint"]
        self.num_rows: int = manifest["counts"]["n_rows"]
        self.num_images: int = manifest["counts"]["n_images"]
        self.num_views = len(manifest["views"])
        self.grid: tuple[int, int] = tuple(manifest["grid"])
        self.num_codes = self.grid[0] * self.grid[1]
        self.class_names: tuple[str, ...] = tuple(manifest["class_names"])
        self.codebook_size: int = manifest["codec"]["codebook_size"]
        self.bytes_per_row: int = manifest["codec"]["bytes_per_row"]
        self._bits: int = manifest["codec"]["bits"]
        self._dtypes = column_dtypes(self.bytes_per_row, bool(self.class_names))
        # One entry per row group over all parts: where its rows start, and a view of each column.
        self._group_starts = np.zeros(0, dtype=np.int64)
        self._groups: list[dict[str, np.ndarray]] = []

    @staticmethod
    def open(path: str, *, verify: bool) -> "CodeDataset":
        """Opens the newest version.

        Args:
            path: local or s3:// folder.
            verify: also hash every part.

        Raises:
            ArtefactError: missing, unfinished or damaged; the text names the file, what was expected and what was found.
        """
        dataset = CodeDataset(path, read_manifest(path))
        bits = num_bits(dataset.codebook_size)
        if (bits, bytes_per_row(dataset.num_codes, bits)) != (dataset._bits, dataset.bytes_per_row):
            raise ArtefactError(
                f"{path} packs {dataset._bits} bits per code and {dataset.bytes_per_row} bytes per row, but a codebook of "
                f"{dataset.codebook_size} needs {bits} and {bytes_per_row(dataset.num_codes, bits)}. Tokenize anew."
            )
        dataset._map_parts(verify)
        return dataset

    def _map_parts(self, verify: bool) -> None:
        starts = []
        for part in self.manifest["parts"]:
            data = self._map(part)
            if verify and (found := sha256_hex(data)) != part["sha256"]:
                raise ArtefactError(
                    f"{storage.join(self.path, part['path'])} is damaged: its sha-256 is {found}, but the manifest says "
                    f"{part['sha256']}. Restore it, or tokenize anew."
                )
            row = part["row_start"]
            for group in part["row_groups"]:
                offsets = {name: column["offset"] for name, column in group["columns"].items()}
                self._groups.append(
                    {
                        name: np.frombuffer(data, dtype, group["rows"], offsets[name])
                        for name, dtype in self._dtypes.items()
                    }
                )
                starts.append(row)
                row += group["rows"]
        self._group_starts = np.asarray(starts, dtype=np.int64)

    def _map(self, part: dict[str, Any]) -> Any:
        path = storage.join(self.path, part["path"])
        try:
            file = open(storage.local_copy(path), "rb")
        except FileNotFoundError:
            raise ArtefactError(
                f"{path} is missing, but the manifest lists it. Restore it, or tokenize anew."
            ) from None
        with file:
            file.seek(0, 2)
            if file.tell() != part["bytes"]:
                raise ArtefactError(
                    f"{path} has {file.tell()} bytes, but the manifest says {part['bytes']}. Restore it, or tokenize anew."
                )
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def _gather(self, name: str, rows: np.ndarray) -> np.ndarray:
        if len(rows) and not (0 <= rows.min() and rows.max() < self.num_rows):
            raise IndexError(f"rows span [{rows.min()}, {rows.max()}], but the dataset has {self.num_rows}")
        out = np.empty(len(rows), dtype=self._dtypes[name])
        groups = np.searchsorted(self._group_starts, rows, side="right") - 1
        for group in np.unique(groups):
            mine = groups == group
            out[mine] = self._groups[group][name][rows[mine] - self._group_starts[group]]
        return out

    def codes(self, rows: np.ndarray) -> np.ndarray:
        """Codes of rows int64 (n,), int64 (n, num_codes)."""
        packed = self._gather(CODES, rows).view(np.uint8).reshape(len(rows), self.bytes_per_row)
        return unpack(packed, self.num_codes, self._bits)

    def labels(self, rows: np.ndarray) -> np.ndarray:
        """Classes of rows, int64 (n,); -1 where there is none."""
        if not self.class_names:
            return np.full(len(rows), -1, dtype=np.int64)
        return self._gather(LABEL, rows).astype(np.int64)

    def image_ids(self, rows: np.ndarray) -> np.ndarray:
        """Image ids of rows, int64 (n,)."""
        return self._gather(IMAGE_ID, rows)

    def views(self, rows: np.ndarray) -> np.ndarray:
        """Index into manifest["views"] of rows, int64 (n,)."""
        return self._gather(VIEW, rows).astype(np.int64)
