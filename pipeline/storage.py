"""One set of functions for local paths and s3:// paths.

S3 goes through s3fs to whatever endpoint the standard AWS environment variables name. Nothing here renames on S3 or trusts
an existence check before a write: `put_if_absent` is `link(2)` locally and a conditional PUT on S3, so exactly one writer
wins. What the S3 client raises becomes a StorageError that says what is wrong with the store; a missing file is a
FileNotFoundError on either side.
"""

import fcntl
import functools
import hashlib
import logging
import mimetypes
import os
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

from pipeline.s3_errors import S3, bucket_and_key, explained, on_store, response
from stages import files
from stages.errors import ConfigError, StorageError, TesseraError
from stages.files import TEMPORARY

CONFLICT_ATTEMPTS = 5
CHUNK_BYTES = 16 << 20
ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/")  # how an address of something begins


def check_address(key: str, path: str) -> None:
    """Refuses an address that is none of S3, which would else be the name of a local folder.

    Args:
        key: of the configuration, for the error.
        path: local and s3:// paths pass.

    Raises:
        ConfigError: such as gs://, S3:// or file:///.
    """
    if ADDRESS.match(path) and not path.startswith(S3):
        raise ConfigError(f"{key} is {path}, but a path is local or begins with {S3}. Write one of these.")


def is_local(path: str, key: str = "path") -> bool:
    """Whether a path is on this machine's file system. Raises what `check_address` raises of `key`."""
    check_address(key, path)
    return not path.startswith(S3)


def absolute(path: str, key: str = "path") -> str:
    """A path that means the same in any working directory; ~ is the home directory. Raises what `check_address` raises of `key`."""
    return os.path.abspath(os.path.expanduser(path)) if is_local(path, key) else S3 + path.removeprefix(S3).rstrip("/")


def join(path: str, *parts: str) -> str:
    """Joins with single slashes."""
    return "/".join([path.rstrip("/"), *(part.strip("/") for part in parts)])


def check_reachable(key: str, path: str) -> None:
    """Refuses a path in a store that is not there or cannot be listed, before any work rests on it.

    Args:
        key: of the configuration, for the error.
        path: local paths pass.

    Raises:
        ConfigError: an address of something else.
        StorageError: no such bucket, no access, or no answer.
    """
    if not is_local(path, key):
        with explained(key, path):
            bucket, prefix = bucket_and_key(path)
            _fs().call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix, MaxKeys=1)


def exists(path: str) -> bool:
    """Whether a file is there. Raises StorageError where that cannot be known."""
    if is_local(path):
        return os.path.isfile(path)
    try:
        return _info(path)["type"] == "file"
    except FileNotFoundError:
        return False


@on_store
def _info(path: str) -> dict[str, Any]:
    return _fs().info(path)


@on_store
def size(path: str) -> int:
    """Bytes of a file. Raises FileNotFoundError."""
    return os.path.getsize(path) if is_local(path) else _fs().size(path)


@on_store
def read_bytes(path: str) -> bytes:
    """A whole file. Raises FileNotFoundError."""
    if is_local(path):
        with open(path, "rb") as file:
            return file.read()
    return _fs().cat_file(path)


@on_store
def read_range(path: str, start: int, length: int) -> bytes:
    """`length` bytes from `start`, fewer where the file ends. Raises FileNotFoundError."""
    if is_local(path):
        with open(path, "rb") as file:
            file.seek(start)
            return file.read(length)
    return _fs().cat_file(path, start=start, end=start + length) if length else b""


@contextmanager
def open_read(path: str) -> Iterator[BinaryIO]:
    """A file to read and seek in, for a `with` statement. Raises FileNotFoundError."""
    with explained("path", path), open(path, "rb") if is_local(path) else _fs().open(path, "rb") as file:
        yield file


def read_chunks(path: str) -> Iterator[bytes]:
    """A whole file piece by piece, so that it need not fit in memory. Raises FileNotFoundError."""
    num_bytes = size(path)
    for start in range(0, num_bytes, CHUNK_BYTES):
        yield read_range(path, start, min(CHUNK_BYTES, num_bytes - start))


@on_store
def list_files(path: str, suffix: str = "", *, follow_links: bool = False) -> list[str]:
    """Every finished file below a folder that ends in `suffix`, full paths, sorted; empty when there is no such folder.

    Args:
        path: the folder.
        suffix: of the names.
        follow_links: whether to list local folders that links lead to, too; see `_walk`.

    Raises:
        StorageError: a folder cannot be listed.
    """
    found = _walk(path, follow_links) if is_local(path) else (S3 + name for name in _fs().find(path))
    return sorted(name for name in found if _is_finished(name, path) and name.endswith(suffix))


@on_store
def list_sizes(path: str, *, follow_links: bool = False) -> dict[str, int | None]:
    """Bytes of the files of `list_files`, by path and in its order; a store gives both in one listing. None for a dangling link."""
    if is_local(path):
        return {name: _size_if_there(name) for name in list_files(path, follow_links=follow_links)}
    found = {S3 + name: info["size"] for name, info in _fs().find(path, detail=True).items()}
    return {name: found[name] for name in sorted(found) if _is_finished(name, path)}


def _size_if_there(path: str) -> int | None:
    try:
        return os.path.getsize(path)
    except FileNotFoundError:
        return None


def _is_finished(file: str, folder: str) -> bool:
    # A listing of a store also names the folder itself.
    return file.startswith(folder.rstrip("/") + "/") and not os.path.basename(file).startswith(TEMPORARY)


def list_temporary_files(path: str, older_than: float) -> list[str]:
    """Files below a folder that dead writers left unfinished before a time in seconds since 1970. S3 has none."""
    if not is_local(path):
        return []
    return sorted(
        name for name in _walk(path, False) if os.path.basename(name).startswith(TEMPORARY) and modified_time(name) < older_than
    )


def _walk(root: str, follow_links: bool) -> Iterator[str]:
    """Every file below a local folder, none when there is no such folder.

    A link to a folder is followed, where that is asked for, but not to what is below the root anyhow, to what the root is below, or to
    where another link has led: no file is listed twice.

    Raises:
        StorageError: a folder cannot be listed; what would be missed could be lost.
    """
    here, led_to, waiting = f"{os.path.realpath(root)}/", set(), [root]
    while waiting:
        for path, is_folder, is_link in _scan(waiting.pop()):
            if not is_folder:
                yield path
            elif not is_link:
                waiting.append(path)
            elif follow_links:
                there = f"{os.path.realpath(path)}/"
                if there not in led_to and not there.startswith(here) and not here.startswith(there):
                    led_to.add(there)
                    waiting.append(path)


def _scan(folder: str) -> list[tuple[str, bool, bool]]:
    """The entries of a local folder in order of name: path, whether it is or leads to a folder, whether it is a link."""
    try:
        return sorted((entry.path, entry.is_dir(), entry.is_symlink()) for entry in os.scandir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise StorageError(
            f"path is {folder}, but it cannot be listed ({error}). Let this user read it, or name a folder without it."
        ) from error


@on_store
def modified_time(path: str) -> float:
    """When a file was written, in seconds since 1970; infinity if it is gone."""
    try:
        return os.path.getmtime(path) if is_local(path) else _fs().modified(path).timestamp()
    except FileNotFoundError:
        return float("inf")


@on_store
def put_if_absent(path: str, data: bytes) -> bool:
    """Writes a file unless it exists; durable and all or nothing. Returns whether this call wrote it."""
    if is_local(path):
        return files.put_if_absent(path, lambda file: file.write(data))
    return _conditional_put(path, functools.partial(_fs().pipe_file, path, data, **_content_type(path)))


@on_store
def put_file_if_absent(path: str, local_file: str) -> bool:
    """Like `put_if_absent`, with the contents of a local file. Raises FileNotFoundError when that file is missing."""
    if not is_local(path):
        return _conditional_put(path, functools.partial(_fs().put_file, local_file, path))
    with open(local_file, "rb") as source:
        return files.put_if_absent(path, lambda file: shutil.copyfileobj(source, file))


@on_store
def replace(path: str, data: bytes) -> None:
    """Writes a file whether it exists or not, all or nothing. For derived files only, such as a report."""
    if is_local(path):
        files.replace(path, lambda file: file.write(data))
    else:
        _fs().pipe_file(path, data, **_content_type(path))


@on_store
def delete(path: str) -> None:
    """Removes a file; nothing happens when there is none."""
    try:
        os.remove(path) if is_local(path) else _fs().rm_file(path)
    except FileNotFoundError:
        pass


def delete_tree(path: str) -> None:
    """Removes a folder with all below it; nothing happens when there is none."""
    if not is_local(path):
        for name in list_files(path):
            delete(name)
    elif os.path.isdir(path):
        shutil.rmtree(path)


@on_store
def download(path: str, local_file: str) -> None:
    """Copies a file to this machine. Raises FileNotFoundError."""
    if is_local(path):
        shutil.copyfile(path, local_file)
    else:
        _fs().get_file(path, local_file)


def local_copy(path: str) -> str:
    """A local file with these bytes: the path itself if local, else a download cached by path and entity tag, one per machine."""
    if is_local(path):
        return path
    info = _info(path)
    key = hashlib.sha256(f"{path}:{info.get('ETag')}:{info['size']}".encode()).hexdigest()
    target = os.path.join(tempfile.gettempdir(), f"tessera-cache-{os.getuid()}", key)
    if not os.path.exists(target):
        os.makedirs(os.path.dirname(target), exist_ok=True)
        with _locked(f"{target}.lock"):
            if not os.path.exists(target):
                _download_whole(path, target)
    return target


@contextmanager
def _locked(path: str) -> Iterator[None]:
    """Holds a lock that processes of this machine, and their threads, wait for. Whoever dies releases it; its empty file stays."""
    with open(path, "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _download_whole(path: str, target: str) -> None:
    """A download that is whole or absent. Its caller is the only one, so that the next takes the place of what a dead one left."""
    temporary = f"{target}.part"
    try:
        download(path, temporary)
        os.replace(temporary, target)
    except BaseException:
        delete(temporary)
        raise


def check_conditional_put(path: str) -> None:
    """Refuses an S3 store that ignores `If-None-Match`, on which two writers could both believe they won.

    Raises:
        TesseraError: the store accepted a second conditional write of the same key.
    """
    if is_local(path):
        return
    probe = join(path, "_tmp", f"probe-{uuid.uuid4().hex}")
    first, second = put_if_absent(probe, b"1"), put_if_absent(probe, b"2")
    delete(probe)
    if not first or second:
        raise TesseraError(
            f"The store behind {path} accepts a conditional write of a key that exists, but commits rest on its refusal. "
            f"Use a store that honours If-None-Match, or a local path."
        )


def _content_type(path: str) -> dict[str, str]:
    """Without it a browser that opens a page or a picture in a bucket saves the file instead of showing it."""
    content_type, _ = mimetypes.guess_type(path)
    return {"ContentType": content_type} if content_type else {}


def _conditional_put(path: str, upload: Callable[..., Any]) -> bool:
    """PUT with `If-None-Match: *`. Each call signs its object, so that a refusal of its own repeated request is told apart."""
    writer = uuid.uuid4().hex
    for attempt in range(CONFLICT_ATTEMPTS):
        try:
            upload(mode="create", Metadata={"writer": writer})
            return True
        except OSError as error:
            status = response(error).get("ResponseMetadata", {}).get("HTTPStatusCode")
            if status == 412:
                return _fs().metadata(path, refresh=True).get("writer") == writer
            if status != 409 or attempt == CONFLICT_ATTEMPTS - 1:  # 409: another writer is at it just now
                raise
            time.sleep(0.1 * 2**attempt)
    raise AssertionError("unreachable")


@functools.cache
def _fs() -> Any:
    import s3fs

    for name in ("aiobotocore", "botocore"):
        logging.getLogger(name).setLevel(logging.WARNING)  # else every process says where it found its credentials
    return s3fs.S3FileSystem(use_listings_cache=False)
