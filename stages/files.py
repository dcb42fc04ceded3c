"""Local files that are whole or absent, and stay so after a power cut."""

import os
import uuid
from collections.abc import Callable
from typing import Any, BinaryIO

TEMPORARY = ".tmp-"  # names of files that are still being written begin so

Write = Callable[[BinaryIO], Any]


def put_if_absent(path: str, write: Write) -> bool:
    """Writes a file unless it exists, and the folders above it. Returns whether this call wrote it: of several writers one does."""
    folder = os.path.dirname(path) or "."
    make_folder(folder)
    temporary = _write_temporary(folder, write)
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    finally:
        os.unlink(temporary)
    _sync_folder(folder)
    return True


def replace(path: str, write: Write) -> None:
    """Writes a file whether it exists or not, and the folders above it."""
    folder = os.path.dirname(path) or "."
    make_folder(folder)
    temporary = _write_temporary(folder, write)
    try:
        os.replace(temporary, path)
    except OSError:
        os.unlink(temporary)
        raise
    _sync_folder(folder)


def move(path: str, target: str) -> None:
    """Moves a file within its file system, and makes the folders above the new place. What was there is replaced."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    folder = os.path.dirname(target) or "."
    make_folder(folder)
    os.replace(path, target)
    _sync_folder(folder)


def make_folder(folder: str) -> None:
    """Makes a folder so that it survives a power cut: its name is in its parent, which is what must be synced."""
    if os.path.isdir(folder):
        return
    parent = os.path.dirname(folder) or "."
    make_folder(parent)
    try:
        os.mkdir(folder)
    except FileExistsError:
        if not os.path.isdir(folder):
            raise
    _sync_folder(parent)


def _write_temporary(folder: str, write: Write) -> str:
    temporary = os.path.join(folder, f"{TEMPORARY}{uuid.uuid4().hex}")
    with open(temporary, "wb") as file:
        try:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        except BaseException:
            os.unlink(temporary)
            raise
    return temporary


def _sync_folder(folder: str) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
