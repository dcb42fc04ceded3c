"""Opens a published code dataset and reads rows by number."""

import bisect
import functools
import os
import threading
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.code_dataset.codec import AS_STORED, unpack_rows
from pipeline.code_dataset.integrity import file_problems, size_problems
from pipeline.code_dataset.manifest import read_manifest, row_format_of
from pipeline.code_dataset.parts import CODES, DESCRIBED, IMAGE_ID, LABEL, VIEW
from pipeline.code_dataset.row_groups import CachedRowGroups, Extent, LocalRowGroups, RowGroups, default_cache_folder
from pipeline.kernels import gather_bytes, span
from stages.errors import ArtefactError, StorageError
from stages.options import CodesOptions

DESCRIBED_GROUPS = 8  # decoded row groups of the describing columns that stay in memory


class CodeDataset:
    """A published code dataset. Rows are numbered in order of (image, view): row = image * num_views + view.

    Reading checks every row group that it touches for the first time against its hash. With `wait=False` the check runs
    beside the caller: a later call, or `settle`, raises what it finds.

    Attributes:
        path, manifest, root_hash, tokenizer_fingerprint: identity.
        num_rows, num_images, num_views, num_codes, grid, codebook_size, bytes_per_row, class_names, conditions: shape.
        row_group_rows: rows per row group; all but the last are full.
        is_remote: whether row groups come from S3.
    """

    def __init__(self, path: str, manifest: dict[str, Any], cache_folder: str | None = None, cache_bytes: int = 0):
        self.path, self.manifest = path, manifest
        self.root_hash: str = manifest["root_hash"]
        self.tokenizer_fingerprint: str = manifest["tokenizer"]["fingerprint"]
        self.is_remote = not storage.is_local(path)
        self.num_rows: int = manifest["counts"]["n_rows"]
        self.num_images: int = manifest["counts"]["n_images"]
        self.num_views = len(manifest["views"])
        self.grid: tuple[int, int] = tuple(manifest["grid"])
        self.class_names: tuple[str, ...] = tuple(manifest["class_names"])
        self.codebook_size: int = manifest["codec"]["codebook_size"]
        self.row_group_rows: int = manifest["codec"]["row_group_rows"]
        self._format = row_format_of(manifest)
        self.conditions, self.num_codes = self._format.conditions, self._format.num_codes
        self.bytes_per_row = self._format.bytes_per_row
        remap = manifest["codec"].get("remap")
        self._original = AS_STORED if remap is None else np.array(remap, np.uint16)
        self._part_starts = [part["row_start"] for part in manifest["parts"]]
        self._group_shift = self.row_group_rows.bit_length() - 1
        self._cache_folder, self._cache_bytes = cache_folder or default_cache_folder(), cache_bytes
        self._columns: dict[str, RowGroups] = {}
        self._lock = threading.Lock()
        self._described = functools.lru_cache(DESCRIBED_GROUPS)(self._read_described)

    @staticmethod
    def open(
        path: str, *, verify: bool, cache_folder: str | None = None, cache_bytes: int = CodesOptions().cache_bytes
    ) -> "CodeDataset":
        """Opens the newest version.

        Args:
            path: local or s3:// folder.
            verify: hash every file of the version, from plan to parts; else local parts must at least have the right size.
            cache_folder: where row groups from S3 are kept; in the system's temporary folder if not given.
            cache_bytes: of row groups that are kept at most, per column.

        Raises:
            ArtefactError: missing, unfinished or damaged; the text names the file, what was expected and what was found.
        """
        manifest = read_manifest(path)
        for problem in file_problems(path, manifest) if verify else size_problems(path, manifest):
            raise ArtefactError(f"{problem}. Restore it, or tokenize anew.")
        return CodeDataset(path, manifest, cache_folder, cache_bytes)

    @property
    def images_per_group(self) -> int:
        """Images whose rows fill about one row group."""
        return max(1, self.row_group_rows // self.num_views)

    def codes(self, rows: np.ndarray, *, wait: bool = True) -> np.ndarray:
        """Codes of rows int64 (n,), uint16 (n, num_codes).

        Raises:
            ArtefactError: a file is missing or damaged.
            IndexError: a row does not exist.
        """
        with self._lock:
            addresses = self._addresses(CODES, rows, wait)
            return unpack_rows(addresses, rows, self._group_shift, self.num_codes, self._format.bits, self._original)

    def labels(self, rows: np.ndarray, *, wait: bool = True) -> np.ndarray:
        """Classes of rows, int64 (n,); -1 where there is none. Raises like `codes`."""
        if not self.class_names:
            return np.full(len(rows), -1, dtype=np.int64)
        return self._gather(LABEL, rows, wait).view("<i4")[:, 0].astype(np.int64)

    def condition(self, name: str, rows: np.ndarray, *, wait: bool = True) -> np.ndarray:
        """A condition map of rows on the code grid, uint8 (n, num_codes). Raises like `codes`."""
        return self._gather(name, rows, wait)

    def settle(self) -> None:
        """Waits until every row group that was touched is checked. Raises ArtefactError if one is damaged."""
        for column in list(self._columns.values()):
            column.settle()

    def prefetch(self, rows: np.ndarray) -> None:
        """Starts to fetch the row groups of rows that will be read later."""
        for column in list(self._columns.values()):
            column.prefetch(np.unique(rows >> self._group_shift).tolist())

    def image_ids(self, rows: np.ndarray) -> np.ndarray:
        """Image ids of rows, int64 (n,)."""
        return self.describe(rows)[IMAGE_ID].to_numpy()

    def views(self, rows: np.ndarray) -> np.ndarray:
        """Index into manifest["views"] of rows, int64 (n,)."""
        return self.describe(rows)[VIEW].to_numpy().astype(np.int64)

    def describe(self, rows: np.ndarray) -> pa.Table:
        """Which image, view and crop each row is: the columns of `pipeline.code_dataset.parts.DESCRIBED`, in order of rows."""
        self._check_range(rows)
        groups = rows >> self._group_shift
        order = np.argsort(groups, kind="stable")
        found, starts = np.unique(groups[order], return_index=True)
        tables = [
            self._described(group).take(rows[mine] & (self.row_group_rows - 1))
            for group, mine in zip(found.tolist(), np.split(order, starts[1:]))
        ]
        if not tables:
            return pa.schema(list(DESCRIBED.items())).empty_table()
        return pa.concat_tables(tables).take(np.argsort(order, kind="stable"))

    def _gather(self, name: str, rows: np.ndarray, wait: bool) -> np.ndarray:
        values = np.empty((len(rows), self._format.addressed[name]), np.uint8)
        with self._lock:
            addresses = self._addresses(name, rows, wait)
            gather_bytes(addresses, rows, self._group_shift, values.shape[1], values)
        return values

    def _addresses(self, name: str, rows: np.ndarray, wait: bool) -> np.ndarray:
        self._check_range(rows)
        if name not in self._columns:
            self._columns[name] = self._open_column(name)
        column = self._columns[name]
        column.require(rows, self._group_shift, wait=wait)
        return column.addresses

    def _check_range(self, rows: np.ndarray) -> None:
        low, high = span(rows) if len(rows) else (0, 0)
        if not 0 <= low <= high < self.num_rows:
            raise IndexError(f"rows span [{low}, {high}], but the dataset has {self.num_rows}")

    def _open_column(self, name: str) -> RowGroups:
        num_groups = -(-self.num_rows // self.row_group_rows)
        extent_of = functools.partial(self._extent, name)
        if not self.is_remote:
            return LocalRowGroups(num_groups, extent_of)
        folder = os.path.join(self._cache_folder, self.root_hash[:16])
        return CachedRowGroups(num_groups, extent_of, folder, self._cache_bytes)

    def _extent(self, name: str, group: int) -> Extent:
        part, index = self._locate(group)
        column = part["row_groups"][index]["columns"][name]
        return Extent(storage.join(self.path, part["path"]), column["offset"], column["bytes"], column["xxh3_64"])

    def _locate(self, group: int) -> tuple[dict[str, Any], int]:
        """The part that holds a row group, and the group's place in it."""
        start = group << self._group_shift
        part = self.manifest["parts"][bisect.bisect_right(self._part_starts, start) - 1]
        return part, (start - part["row_start"]) >> self._group_shift

    def _read_described(self, group: int) -> pa.Table:
        part, index = self._locate(group)
        path = storage.join(self.path, part["path"])
        try:
            with storage.open_read(path) as file:
                parquet = pq.ParquetFile(file, page_checksum_verification=True)
                return parquet.read_row_group(index, columns=list(DESCRIBED))
        except StorageError:
            raise  # says itself what is wrong with the store
        except (OSError, pa.ArrowException) as error:
            raise ArtefactError(
                f"{path} is missing or damaged ({error}), but the manifest lists it. Restore it, or tokenize anew."
            ) from error
