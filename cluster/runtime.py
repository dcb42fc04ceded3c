"""The connection to Ray: a cluster when one is named, else a private local instance."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import ray
from ray.exceptions import RayTaskError

from stages.errors import TesseraError

logger = logging.getLogger(__name__)

# Processes that train or encode allocate and free the same large tensors every step. Telling glibc to keep those pages instead of
# returning them to the kernel roughly halves the time of such a step on CPU.
WORKER_ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 32),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 32),
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "600",
    "RAY_AIR_NEW_OUTPUT": "0",
}


def connect(*, num_cpus: int | None = None, object_store_bytes: int | None = None) -> None:
    """Joins the cluster in RAY_ADDRESS (set inside `ray job submit`), or starts Ray on this machine only.

    Args:
        num_cpus: CPUs of a local instance; all of the machine's if not given.
        object_store_bytes: shared memory of a local instance; Ray's default if not given.
    """
    if ray.is_initialized():
        return
    if os.environ.get("RAY_ADDRESS"):
        ray.init(runtime_env={"env_vars": WORKER_ENVIRONMENT}, log_to_driver=True)
        return
    for name, value in WORKER_ENVIRONMENT.items():
        os.environ.setdefault(name, value)  # a local raylet inherits these, which spares a runtime environment
    ray.init(
        address="local",
        include_dashboard=False,
        num_cpus=num_cpus,
        object_store_memory=object_store_bytes,
        logging_level=logging.WARNING,
        log_to_driver=True,
    )


@contextmanager
def user_errors() -> Iterator[None]:
    """Raises the user's error that travelled inside Ray's wrappers as itself."""
    try:
        yield
    except TesseraError:
        raise
    except Exception as error:
        inner = find_user_error(error)
        if inner is None:
            raise
        raise inner from None


def find_user_error(error: BaseException | None) -> TesseraError | None:
    """The TesseraError inside Ray's task and training errors, or None."""
    if error is None or isinstance(error, TesseraError):
        return error
    candidates = [error.__cause__]
    if isinstance(error, RayTaskError):
        candidates.append(error.cause)
    candidates += list(getattr(error, "worker_failures", {}).values())
    candidates.append(getattr(error, "controller_failure", None))
    for candidate in candidates:
        if candidate is not error and isinstance(candidate, BaseException):
            found = find_user_error(candidate)
            if found is not None:
                return found
    return None
