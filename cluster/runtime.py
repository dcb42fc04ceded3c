"""The connection to Ray: a cluster when one is named, else a private local instance."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import ray
from ray.exceptions import RayTaskError

from stages.errors import TesseraError

logger = logging.getLogger(__name__)

# Ray's default of one minute is too short where machines are still being started.
START_TIMEOUT = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"
# Without it, a process that Ray gave no GPU sees all of them, and would take one that Ray gives to others.
HIDE_GPUS = "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"
WORKER_ENVIRONMENT = {START_TIMEOUT: "600", HIDE_GPUS: "1"}


def has_cluster() -> bool:
    """Whether a cluster is named; without one, Ray runs on this machine only and ends with this process."""
    return bool(os.environ.get("RAY_ADDRESS"))


@contextmanager
def connected(*, num_cpus: int | None = None, object_store_bytes: int | None = None) -> Iterator[None]:
    """Ray for the length of a job: the one already there, else the cluster in RAY_ADDRESS (set inside `ray job submit`), else
    a local one. What was started is left at the end, before anything is printed that no worker's output may follow.

    Args:
        num_cpus: CPUs of a local instance; all of the machine's if not given.
        object_store_bytes: shared memory of a local instance; Ray's default if not given.

    Raises:
        TesseraError: a user's error that travelled inside Ray's wrappers, as itself.
    """
    if ray.is_initialized():
        with user_errors():
            yield
        return
    if has_cluster():
        # What the job brought along wins, and Ray refuses the same variable twice.
        missing = {name: value for name, value in WORKER_ENVIRONMENT.items() if name not in os.environ}
        ray.init(runtime_env={"env_vars": missing}, log_to_driver=True)
    else:
        _start_local(num_cpus, object_store_bytes)
    try:
        with user_errors():
            yield
    finally:
        ray.shutdown()


def _start_local(num_cpus: int | None, object_store_bytes: int | None) -> None:
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
    except Exception as error:
        inner = find_user_error(error)
        if inner is None or inner is error:
            raise
        raise inner from None


def find_user_error(error: BaseException | None) -> TesseraError | None:
    """The TesseraError inside Ray's task and training errors, or None.

    A RayTaskError is made an instance of its cause's class, but its text is Ray's, so its cause is looked at first.
    """
    if error is None:
        return None
    if isinstance(error, TesseraError) and not isinstance(error, RayTaskError):
        return error
    inner = [getattr(error, "cause", None), error.__cause__, getattr(error, "controller_failure", None)]
    inner += [*getattr(error, "worker_failures", {}).values(), *error.args]  # the last: of an actor whose constructor failed
    found = (find_user_error(e) for e in inner if isinstance(e, BaseException) and e is not error)
    return next((e for e in found if e is not None), None)
