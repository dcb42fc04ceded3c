"""One set of functions for local paths and s3:// paths.

S3 goes through s3fs to whatever endpoint the standard AWS environment variables name. Nothing here renames on S3 or trusts an
existence check before a write: `put_if_absent` is `link(2)` locally and a conditional PUT on S3, so exactly one writer wins.
"""

import functools
import hashlib
import os
import shutil
import tempfile
import uuid
from typing import Any

from stages.errors import TesseraError

S3 = "s3://"


def is_local(path: str) -> bool:
    """Whether a path is on this machine's file system."""
    return not path.startswith(S3)


def absolute(path: str) -> str:
    """A path that means the same in any working directory."""
    return os.path.abspath(path) if is_local(path) else path.rstrip("/")


def join(path: str, *parts: str) -> str:
    """Joins with single slashes."""
    return "/".join([path.rstrip("/"), *(part.strip("/") for part in parts)])


def exists(path: str) -> bool:
    """Whether a file is there."""
    if is_local(path):
        return os.path.isfile(path)
    return _fs().isfile(path)


def size(path: str) -> int:
    """Bytes of a file. Raises FileNotFoundError."""
    return os.path.getsize(path) if is_local(path) else _fs().size(path)


def read_bytes(path: str) -> bytes:
    """A whole file. Raises FileNotFoundError."""
    if is_local(path):
        with open(path, "rb") as file:
            return file.read()
    return _fs().cat_file(path)


def read_range(path: str, start: int, length: int) -> bytes:
    """`length` bytes from `start`. Raises FileNotFoundError."""
    if is_local(path):
        with open(path, "rb") as file:
            file.seek(start)
            return file.read(length)
    return _fs().cat_file(path, start=start, end=start + length)


def list_files(path: str, suffix: str = "") -> list[str]:
    """Every file below a folder that ends in `suffix`, full paths, sorted; empty when there is no such folder."""
    if is_local(path):
        found = [os.path.join(root, name) for root, _, names in os.walk(path) for name in names]
    else:
        fs = _fs()
        fs.invalidate_cache()
        found = [S3 + name for name in fs.find(path)]
    return sorted(name for name in found if name.endswith(suffix))


def put_if_absent(path: str, data: bytes) -> bool:
    """Writes a file unless it exists; durable and all or nothing. Returns whether this call wrote it."""
    if is_local(path):
        return _link_new(path, lambda file: file.write(data))
    return _conditional_put(path, data)


def put_file_if_absent(path: str, local_file: str) -> bool:
    """Like `put_if_absent`, with the contents of a local file."""
    with open(local_file, "rb") as source:
        if is_local(path):
            return _link_new(path, lambda file: shutil.copyfileobj(source, file))
        return _conditional_put(path, source.read())


def replace(path: str, data: bytes) -> None:
    """Writes a file whether it exists or not, all or nothing. For derived files only, such as a report."""
    if not is_local(path):
        _fs().pipe_file(path, data)
        return
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    temporary = f"{path}.tmp-{uuid.uuid4().hex}"
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def delete(path: str) -> None:
    """Removes a file; nothing happens when there is none."""
    try:
        os.remove(path) if is_local(path) else _fs().rm_file(path)
    except FileNotFoundError:
        pass


def delete_tree(path: str) -> None:
    """Removes a folder with all below it; nothing happens when there is none."""
    if is_local(path):
        shutil.rmtree(path, ignore_errors=True)
        return
    for name in list_files(path):
        delete(name)


def local_copy(path: str) -> str:
    """A local file with these bytes: the path itself if local, else a download cached by path and entity tag."""
    if is_local(path):
        return path
    info = _fs().info(path)
    key = hashlib.sha256(f"{path}:{info.get('ETag')}:{info['size']}".encode()).hexdigest()
    target = os.path.join(tempfile.gettempdir(), f"tessera-cache-{os.getuid()}", key)
    if not os.path.exists(target):
        os.makedirs(os.path.dirname(target), exist_ok=True)
        temporary = f"{target}.{uuid.uuid4().hex}"
        _fs().get_file(path, temporary)
        os.replace(temporary, target)
    return target


def check_conditional_put(path: str) -> None:
    """Refuses an S3 store that ignores `If-None-Match`, on which two writers could both believe they won.

    Raises:
        TesseraError: the store accepted a second conditional write of the same key.
    """
    if is_local(path):
        return
    probe = join(path, "_tmp", f"probe-{uuid.uuid4().hex}")
    first, second = _conditional_put(probe, b"1"), _conditional_put(probe, b"2")
    delete(probe)
    if not first or second:
        raise TesseraError(
            f"The store behind {path} accepts a conditional write of a key that exists, but commits rest on its refusal. Use a store that "
            f"honours If-None-Match, or a local path."
        )


def _link_new(path: str, write: Any) -> bool:
    folder = os.path.dirname(path) or "."
    os.makedirs(folder, exist_ok=True)
    temporary = os.path.join(folder, f".tmp-{uuid.uuid4().hex}")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        _sync_folder(folder)
        return True
    finally:
        os.unlink(temporary)


def _sync_folder(folder: str) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _conditional_put(path: str, data: bytes) -> bool:
    try:
        _fs().pipe_file(path, data, mode="create")
    except FileExistsError:
        return False
    return True


@functools.cache
def _fs() -> Any:
    import s3fs

    return s3fs.S3FileSystem(use_listings_cache=False)
