"""Where the files of a checkpoint are until they are published: in memory where there is room, so that training goes on at once."""

import contextlib
import fcntl
import os
import shutil
import tempfile
import time

import psutil

MEMORY = "/dev/shm"
PREFIX = "tessera-save-"
ROOM = 2.0  # the memory that must be free, in multiples of what is saved
ABANDONED_SECONDS = 60.0


class Staging:
    """A new folder of this process, which `close` removes; a process that died leaves it to `remove_abandoned`.

    Args:
        in_memory: whether to make it in memory, else in the system's temporary folder.

    Attributes:
        path: the folder.
    """

    def __init__(self, in_memory: bool):
        self.path = tempfile.mkdtemp(prefix=PREFIX, dir=MEMORY if in_memory else None)
        self._lock = _lock(self.path)

    def close(self) -> None:
        """Removes the folder."""
        shutil.rmtree(self.path)
        if self._lock is not None:
            os.close(self._lock)


def memory_has_room(num_bytes: int) -> bool:
    """Whether so many bytes fit into the memory of this machine beside what needs it now."""
    if not os.path.isdir(MEMORY):
        return False
    free = min(shutil.disk_usage(MEMORY).free, psutil.virtual_memory().available)
    return free >= ROOM * num_bytes


def remove_abandoned() -> None:
    """Removes the folders of processes that died; locks tell them from those in use."""
    for parent in {MEMORY, tempfile.gettempdir()}:
        if not os.path.isdir(parent):
            continue
        for entry in os.scandir(parent):
            # Another process may be at it too, and what belongs to another user is theirs to remove.
            with contextlib.suppress(FileNotFoundError, PermissionError):
                _remove_if_abandoned(entry)


def _remove_if_abandoned(entry: os.DirEntry[str]) -> None:
    # A folder that was just made may not be locked yet.
    if entry.name.startswith(PREFIX) and time.time() - entry.stat().st_mtime > ABANDONED_SECONDS:
        lock = _lock(entry.path)
        if lock is not None:
            shutil.rmtree(entry.path, ignore_errors=True)
            os.close(lock)


def _lock(folder: str) -> int | None:
    """A descriptor that holds the lock of a folder as long as this process lives; None where another holds it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor
