"""What the S3 client raises, as errors that say what is wrong with the store and what to do about it."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Concatenate, ParamSpec, TypeVar

from stages.errors import StorageError

S3 = "s3://"
P = ParamSpec("P")
T = TypeVar("T")


@contextmanager
def explained(key: str, path: str) -> Iterator[None]:
    """Raises what the S3 client raises as a StorageError; faults of this machine's files stay what they are."""
    try:
        yield
    except Exception as error:
        fault = store_fault(path, error) if path.startswith(S3) else None
        if fault is None:
            raise
        raise StorageError(f"{key} is {path}, but {fault}") from error


def on_store(function: Callable[Concatenate[str, P], T]) -> Callable[Concatenate[str, P], T]:
    """A function of a path whose S3 errors are explained."""

    @functools.wraps(function)
    def wrapper(path: str, *args: P.args, **kwargs: P.kwargs) -> T:
        with explained("path", path):
            return function(path, *args, **kwargs)

    return wrapper


def store_fault(path: str, error: Exception) -> str | None:
    """What is wrong with the store and the way out; None when the error is not about the store."""
    from aiohttp import ClientError as ConnectionFault
    from botocore.exceptions import BotoCoreError, NoCredentialsError, ParamValidationError
    from fsspec.exceptions import FSTimeoutError

    if isinstance(error, StorageError):
        return None
    code = response(error).get("Error", {}).get("Code")
    if code == "NoSuchBucket":
        return f"there is no bucket {bucket_and_key(path)[0]}. Create it, or correct the path."
    if isinstance(error, NoCredentialsError) or (code and isinstance(error, PermissionError)):
        return (
            f"the store refuses access ({error}). Check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, and what they are "
            f"allowed in this bucket."
        )
    if isinstance(error, ParamValidationError) or not bucket_and_key(path)[0]:
        return f"that is no place in an S3 store ({error}). Write s3://bucket/folder."
    is_bad_endpoint = isinstance(error, ValueError) and "Invalid endpoint" in str(error)
    if is_bad_endpoint or isinstance(error, (BotoCoreError, ConnectionFault, FSTimeoutError)):
        return f"the store cannot be reached ({error}). Check AWS_ENDPOINT_URL, and that the store runs."
    if code and not isinstance(error, FileNotFoundError):
        return f"the store fails ({error}). Run the command again once it works."
    return None


def bucket_and_key(path: str) -> tuple[str, str]:
    """The two parts of an s3:// path."""
    bucket, _, key = path.removeprefix(S3).partition("/")
    return bucket, key


def response(error: Exception) -> dict[str, Any]:
    """The store's answer behind an error of the S3 client; empty when there was none."""
    return getattr(error.__cause__, "response", {})
