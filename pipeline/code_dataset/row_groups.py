"""Row groups in memory: mapped from local parts, or fetched by range from S3 into a local cache. Every one is checked.

A reader asks for groups of a column and gets addresses. A group that was not asked for before is compared with its xxh3_64:
local ones by a thread beside the reader, fetched ones before they are used.
"""

import functools
import logging
import mmap
import os
import tempfile
import threading
import time
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

logger = logging.getLogger(__name__)

NUM_FETCHERS = 8
TEMPORARY_SECONDS = 3600.0  # older than any fetch that still runs
MEMORY_BYTES = 1 << 30  # of a column's groups that cannot be kept as files


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

    A cached file proves itself: it is used if its hash is right, whoever wrote it, and fetched anew if not. Where one cannot be written,
    as on a full disk, its group is served from memory: 1 GiB of such groups of a column are kept, and those that are asked for at once.

    Args:
        num_groups: of the column.
        extent_of: where each of them is.
        folder: of the cache.
        max_bytes: what this process leaves of the column at most, files that it found included; those used longest ago go first.
    """

    def __init__(self, num_groups: int, extent_of: Callable[[int], Extent], folder: str, max_bytes: int):
        self.addresses = np.zeros(num_groups, np.uint64)
        self._extent_of, self._folder, self._max_bytes = extent_of, folder, max_bytes
        self._maps: dict[int, mmap.mmap] = {}
        self._without_file: set[int] = set()
        self._fetcher = ThreadPoolExecutor(max_workers=NUM_FETCHERS, thread_name_prefix="row-group-fetcher")
        self._ahead: dict[int, Future[mmap.mmap]] = {}
        self._lock = threading.Lock()
        os.makedirs(folder, exist_ok=True)
        self._sizes = self._find_files()  # bytes of the files of groups, mapped or not, the one used longest ago first
        self._evict(keep=0)

    def require(self, rows: np.ndarray, group_shift: int, *, wait: bool = False) -> None:
        wanted = np.unique(rows >> group_shift).tolist()
        missing = [group for group in wanted if not self.addresses[group]]
        self.prefetch(missing)
        for group in missing:
            if self._ahead[group].exception() is not None:  # known once it is there
                self._ahead.pop(group).result()
        self._keep_fetched()
        for group in wanted:
            self._sizes.move_to_end(group)
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

    def _keep_fetched(self) -> None:
        """Takes over what was fetched, asked for or not yet. What failed stays until it is asked for."""
        with self._lock:
            done = [group for group, future in self._ahead.items() if future.done() and future.exception() is None]
            fetched = {group: self._ahead.pop(group).result() for group in done}
        for group, mapped in fetched.items():
            self._maps[group], self._sizes[group] = mapped, len(mapped)
            self._sizes.move_to_end(group)
            self.addresses[group] = np.frombuffer(mapped, np.uint8).ctypes.data

    def _find_files(self) -> OrderedDict[int, int]:
        """Bytes of the column's files that are there, by group, the oldest first. What dead processes left half written goes."""
        groups = {self._file(group): group for group in range(len(self.addresses))}
        found = []
        for entry in os.scandir(self._folder):
            try:
                status = entry.stat()
                if entry.path in groups:
                    found.append((status.st_mtime, groups[entry.path], status.st_size))
                elif "." in entry.name and status.st_mtime < time.time() - TEMPORARY_SECONDS:
                    os.unlink(entry.path)
            except FileNotFoundError:
                pass  # another process of this machine was first
        return OrderedDict((group, num_bytes) for _, group, num_bytes in sorted(found))

    def _fetch(self, group: int) -> mmap.mmap:
        """The group's file in memory, checked. It stays there if another process of this machine removes the file to make room."""
        extent, file = self._extent_of(group), self._file(group)
        self._without_file.discard(group)
        try:
            mapped = _map_file(file)
            extent.check(memoryview(mapped)[: len(mapped) - READ_AHEAD])
            return mapped
        except (FileNotFoundError, ValueError, ArtefactError):
            pass  # not here, empty, or not whole
        try:
            values = storage.read_range(extent.path, extent.offset, extent.num_bytes)
        except FileNotFoundError:
            raise ArtefactError(
                f"{extent.path} is missing, but the manifest lists it. Restore it, or tokenize anew."
            ) from None
        extent.check(values)
        data = values + bytes(READ_AHEAD)
        try:
            return _write_file(file, data)
        except OSError as error:
            _warn_of_no_file(self._folder, str(error.strerror))
        self._without_file.add(group)
        mapped = mmap.mmap(-1, len(data))
        mapped.write(data)
        return mapped

    def _evict(self, keep: int) -> None:
        self._make_room(list(self._sizes), self._max_bytes, keep)
        self._make_room([group for group in self._sizes if group in self._without_file], MEMORY_BYTES, keep)

    def _make_room(self, groups: list[int], max_bytes: int, keep: int) -> None:
        """Drops groups from the first on until so many bytes of them are left, or the last `keep` alone."""
        total = sum(self._sizes[group] for group in groups)
        for group in groups[: max(0, len(groups) - keep)]:
            if total <= max_bytes:
                return
            total -= self._sizes[group]
            self._drop(group)

    def _drop(self, group: int) -> None:
        del self._sizes[group]
        if group in self._maps:
            self.addresses[group] = 0
            self._maps.pop(group).close()
        if group not in self._without_file:
            try:
                os.unlink(self._file(group))
            except FileNotFoundError:
                pass  # another process of this machine was first


def _write_file(path: str, data: bytes) -> mmap.mmap:
    """A file that is whole or absent, in memory. It stays there if another process of this machine removes it to make room."""
    temporary = f"{path}.{uuid.uuid4().hex}"
    try:
        with open(temporary, "wb") as file:
            file.write(data)
        mapped = _map_file(temporary)
        os.replace(temporary, path)
        return mapped
    except BaseException:
        if os.path.exists(temporary):
            os.unlink(temporary)
        raise


@functools.cache
def _warn_of_no_file(folder: str, reason: str) -> None:
    """Once per folder and reason."""
    logger.warning(
        "codes.cache_path is %s, but row groups cannot be written there (%s): few are kept, in memory, and others are fetched again when "
        "needed. Make room there, or name another folder",
        folder,
        reason,
    )


def _map_file(path: str) -> mmap.mmap:
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def default_cache_folder() -> str:
    """Where row groups from S3 are kept if the configuration does not say."""
    return os.path.join(tempfile.gettempdir(), f"tessera-cache-{os.getuid()}", "row-groups")
