"""Row groups in memory: mapped from local parts, or fetched by range from S3 into a local cache. Every one is checked.

A reader asks for groups of a column and gets addresses. A group that was not asked for before is compared with its xxh3_64:
local ones by a thread beside the reader, fetched ones before they are used.
"""

import mmap
import os
import tempfile
import threading
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import xxhash

from pipeline import storage
from pipeline.kernels import READ_AHEAD, first_absent
from stages.errors import ArtefactError

NUM_FETCHERS = 8


@dataclass(frozen=True)
class Extent:
    """Where a column's values of one row group are: a path, a byte range of it, and their xxh3_64."""

    path: str
    offset: int
    num_bytes: int
    xxh3_64: str

    def check(self, values: Any) -> None:
        """Raises ArtefactError unless these are the bytes that were published."""
        found = xxhash.xxh3_64_hexdigest(values)
        if found != self.xxh3_64:
            raise ArtefactError(
                f"{self.path} is damaged: bytes {self.offset} to {self.offset + self.num_bytes} have xxh3_64 {found}, but the "
                f"manifest says {self.xxh3_64}. Restore it, or tokenize anew."
            )


class RowGroups(Protocol):
    """Groups of one column."""

    addresses: np.ndarray  # uint64 (num_groups,), 0 where a group is not in memory

    def require(self, rows: np.ndarray, group_shift: int, *, wait: bool = False) -> None:
        """Brings the groups of rows into memory. ArtefactError when one is missing or, as far as is known, damaged.

        Args:
            rows: int64 (n,), of any order and number.
            group_shift: log2 of the rows per group.
            wait: for the checks of groups that were not in memory; without it they may run beside the caller.
        """

    def prefetch(self, groups: Iterable[int]) -> None:
        """Starts bringing groups near."""

    def settle(self) -> None:
        """Waits until everything that was required is checked. ArtefactError when any of it is damaged."""


class LocalRowGroups:
    """Memory-mapped groups of local parts, which have the size that the manifest says.

    Args:
        num_groups: of the column.
        extent_of: where each of them is.
    """

    def __init__(self, num_groups: int, extent_of: Callable[[int], Extent]):
        self.addresses = np.zeros(num_groups, np.uint64)
        self._extent_of = extent_of
        self._maps: dict[str, np.ndarray] = {}
        self._checker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="row-group-checker")
        self._checks: list[Future[None]] = []

    def require(self, rows: np.ndarray, group_shift: int, *, wait: bool = False) -> None:
        self._raise_known()
        found = []
        while (group := first_absent(self.addresses, rows, group_shift)) >= 0:
            extent = self._extent_of(group)
            values = self._map(extent.path)[extent.offset : extent.offset + extent.num_bytes]
            if wait:
                extent.check(values)
            self.addresses[group] = values.ctypes.data
            found.append((extent, values))
        if found and not wait:
            self._checks.append(self._checker.submit(_check_all, found))
        if wait and self._checks:
            self.settle()

    def prefetch(self, groups: Iterable[int]) -> None:
        pass  # the kernel reads ahead

    def settle(self) -> None:
        for check in list(self._checks):  # a copy: another thread may be reading on
            check.result()

    def _raise_known(self) -> None:
        while self._checks and self._checks[0].done():
            self._checks[0].result()
            self._checks.pop(0)

    def _map(self, path: str) -> np.ndarray:
        if path not in self._maps:
            with open(path, "rb") as file:
                self._maps[path] = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
        return self._maps[path]


def _check_all(found: list[tuple[Extent, np.ndarray]]) -> None:
    for extent, values in found:
        extent.check(values)


class CachedRowGroups:
    """Groups of parts on S3, fetched by range and kept in a local folder that the processes of a machine share.

    A cached file proves itself: it is used if its hash is right, whoever wrote it, and fetched anew if not.

    Args:
        num_groups: of the column.
        extent_of: where each of them is.
        folder: of the cache.
        max_bytes: what this process keeps of the column at most; the groups used longest ago go first.
    """

    def __init__(self, num_groups: int, extent_of: Callable[[int], Extent], folder: str, max_bytes: int):
        self.addresses = np.zeros(num_groups, np.uint64)
        self._extent_of, self._folder, self._max_bytes = extent_of, folder, max_bytes
        self._maps: OrderedDict[int, mmap.mmap] = OrderedDict()
        self._fetcher = ThreadPoolExecutor(max_workers=NUM_FETCHERS, thread_name_prefix="row-group-fetcher")
        self._ahead: dict[int, Future[None]] = {}
        self._lock = threading.Lock()
        os.makedirs(folder, exist_ok=True)

    def require(self, rows: np.ndarray, group_shift: int, *, wait: bool = False) -> None:
        wanted = np.unique(rows >> group_shift).tolist()
        missing = [group for group in wanted if not self.addresses[group]]
        self.prefetch(missing)
        for group in missing:
            self._ahead.pop(group).result()
            self._map(group)
        for group in wanted:
            self._maps.move_to_end(group)
        self._evict(keep=len(wanted))

    def prefetch(self, groups: Iterable[int]) -> None:
        with self._lock:
            for group in groups:
                if not self.addresses[group] and group not in self._ahead:
                    self._ahead[group] = self._fetcher.submit(self._fetch, group)

    def settle(self) -> None:
        pass  # nothing is used before it is checked

    def _file(self, group: int) -> str:
        extent = self._extent_of(group)
        return os.path.join(
            self._folder, f"{xxhash.xxh3_64_hexdigest(extent.path.encode())}-{extent.offset}-{extent.xxh3_64}"
        )

    def _fetch(self, group: int) -> None:
        extent, file = self._extent_of(group), self._file(group)
        try:
            with open(file, "rb") as cached:
                data = cached.read()
            extent.check(data[: len(data) - READ_AHEAD])
            return
        except (FileNotFoundError, ArtefactError):
            pass  # not here, or not whole
        try:
            values = storage.read_range(extent.path, extent.offset, extent.num_bytes)
        except FileNotFoundError:
            raise ArtefactError(
                f"{extent.path} is missing, but the manifest lists it. Restore it, or tokenize anew."
            ) from None
        extent.check(values)
        temporary = f"{file}.{uuid.uuid4().hex}"
        with open(temporary, "wb") as target:
            target.write(values + bytes(READ_AHEAD))
        os.replace(temporary, file)

    def _map(self, group: int) -> None:
        if not os.path.exists(self._file(group)):
            self._fetch(group)  # another process of this machine made room since
        with open(self._file(group), "rb") as file:
            self._maps[group] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.addresses[group] = np.frombuffer(self._maps[group], np.uint8).ctypes.data

    def _evict(self, keep: int) -> None:
        total = sum(map(len, self._maps.values()))
        while total > self._max_bytes and len(self._maps) > keep:
            group, mapped = self._maps.popitem(last=False)
            self.addresses[group] = 0
            total -= len(mapped)
            mapped.close()
            try:
                os.unlink(self._file(group))
            except FileNotFoundError:
                pass  # another process of this machine was first


def default_cache_folder() -> str:
    """Where row groups from S3 are kept if the configuration does not say."""
    return os.path.join(tempfile.gettempdir(), f"tessera-cache-{os.getuid()}", "row-groups")
