"""A Ray Train worker group for either stage: one process per rank, restarted together after a failure."""

import logging
import os
import time
from collections.abc import Callable
from typing import Any, TypeVar

import ray
import ray.train
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

from cluster import checkpoints
from cluster.runtime import START_TIMEOUT, has_cluster, user_errors
from cluster.stop_request import Stopped, StopRequest
from pipeline import storage
from stages.errors import ConfigError, StorageError
from stages.options import ScalingOptions

logger = logging.getLogger(__name__)

ELASTIC_START_SECONDS = 60
RETRY_SECONDS = 5.0

Answer = TypeVar("Answer")


class _Trainer(TorchTrainer):
    """A trainer without what its workers must not wait for, or must not have.

    Every start of a group starts an actor for its Ray datasets, of which our workers use none: a second of a core per restart.

    The placement-group cleaner outlives a driver to free what it held in a cluster; a local instance ends with its driver. There the
    cleaner does harm: it asks the dashboard whether the job lives, finds that of any other Ray on the machine, and ends our workers
    because that one does not know them.
    """

    def _create_default_callbacks(self) -> list[Any]:
        unwanted = (DatasetsCallback,) if has_cluster() else (DatasetsCallback, PlacementGroupCleanerCallback)
        callbacks = super()._create_default_callbacks()  # type: ignore[misc]  # not in the public stubs
        return [callback for callback in callbacks if not isinstance(callback, unwanted)]


def run_workers(
    worker: Callable[..., None],
    options: Any,
    scaling: ScalingOptions,
    storage_path: str,
    stop: StopRequest | None = None,
) -> None:
    """Runs `worker(options, num_threads)` on every rank of a Ray Train worker group, and again on all when one fails.

    Ray's own state goes to a folder of its own, new for every call: what survives a crash is our commits, not Ray's snapshots.

    Args:
        worker: also takes the function `should_leave` if `stop` is given.
        options: of the job.
        scaling: a range of workers lets the group shrink and grow with the cluster.
        storage_path: for Ray's own state.
        stop: a request that workers shall see.

    Raises:
        TesseraError: a worker's, after the last restart.
        ray.train.TrainingFailedError: any other failure.
    """
    extra = () if stop is None else (stop.should_leave,)

    def run_rank() -> None:
        local_world_size = ray.train.get_context().get_local_world_size()
        worker(options, scaling.threads_per_worker or max(1, (os.cpu_count() or 1) // local_world_size), *extra)

    trainer = _Trainer(
        run_rank,
        torch_config=TorchConfig(),
        scaling_config=ray.train.ScalingConfig(
            num_workers=scaling.num_workers,  # type: ignore[arg-type]  # the stubs are of the older Ray Train
            elastic_resize_monitor_interval_s=scaling.resize_every_seconds,  # type: ignore[call-arg]
            placement_strategy=scaling.placement_strategy,
            use_gpu=scaling.use_gpu,
            resources_per_worker={"CPU": scaling.cpus_per_worker, **({"GPU": 1} if scaling.use_gpu else {})},
        ),
        run_config=ray.train.RunConfig(
            name=f"attempt-{checkpoints.new_attempt()}",
            storage_path=storage_path,
            failure_config=ray.train.FailureConfig(max_failures=scaling.max_failures),
        ),
    )
    # Ray ends a group of which a worker does not answer for so long, such as a stopped process.
    os.environ.setdefault("RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S", str(scaling.hang_timeout_seconds))
    if scaling.min_workers < scaling.max_workers:
        # When a node dies its workers do first, so Ray starts a group that counts on the node; only after this time with fewer.
        os.environ.setdefault(START_TIMEOUT, str(ELASTIC_START_SECONDS))
    try:
        with user_errors():
            trainer.fit()
    finally:
        storage.delete_tree(storage_path)


def run_to_the_end(
    worker: Callable[..., None], options: Any, scaling: ScalingOptions, run_path: str, num_steps: int
) -> checkpoints.Commit:
    """Runs groups of workers, each with `scaling.max_failures` restarts, as long as each commits something.

    SIGTERM to this process makes the workers commit and leave.

    Args:
        worker: of `run_workers`; commits into `run_path`, and goes on from there.
        options: of the job.
        scaling: of the group.
        run_path: folder of the commits.
        num_steps: of the whole run.

    Returns:
        The commit after `num_steps` steps, its files unchecked.

    Raises:
        Stopped: SIGTERM came first.
        TesseraError, ray.train.TrainingFailedError: as `run_workers`.
    """
    stop = StopRequest()
    with stop.on_sigterm():
        while True:
            before = _newest_commit(run_path, scaling)
            try:
                run_workers(worker, options, scaling, storage.join(run_path, "ray"), stop=stop)
            except (ray.train.TrainingFailedError, StorageError) as error:
                if stop.is_made or not _got_on(before, run_path, scaling):
                    raise
                logger.warning("The workers failed too often, but got on since they started: starting again. %s", error)
                continue
            newest = _newest_commit(run_path, scaling)
            if newest is not None and newest.step >= num_steps:
                return newest
            if stop.is_made:
                raise Stopped(
                    f"SIGTERM ended the run at step {_step(newest)} of {num_steps}, which is committed. Run the same command "
                    f"again: it goes on from there."
                )


def _got_on(before: checkpoints.Commit | None, run_path: str, scaling: ScalingOptions) -> bool:
    """Whether workers committed steps beyond what was the newest commit, or found that one damaged, so that theirs cannot be counted."""
    if _step(_newest_commit(run_path, scaling)) > _step(before):
        return True
    return before is not None and _ask(lambda: checkpoints.was_set_aside(before), scaling)


def _step(commit: checkpoints.Commit | None) -> int:
    return 0 if commit is None else commit.step


def _newest_commit(run_path: str, scaling: ScalingOptions) -> checkpoints.Commit | None:
    return _ask(lambda: checkpoints.newest_commit(run_path), scaling)


def _ask(question: Callable[[], Answer], scaling: ScalingOptions) -> Answer:
    """The answer of a store, which is asked again while it fails, for as long as a worker may hang."""
    deadline = time.monotonic() + scaling.hang_timeout_seconds
    while True:
        try:
            return question()
        except StorageError as error:
            if time.monotonic() > deadline:
                raise
            logger.warning("Asking again: %s", error)
            time.sleep(RETRY_SECONDS)


def check_workers_fit(scaling: ScalingOptions, needs_data_cpu: bool) -> None:
    """Refuses a worker group the cluster can never start, which Ray would wait for without end."""
    resources = ray.cluster_resources()
    cpus, wanted = resources.get("CPU", 0.0), scaling.min_workers * scaling.cpus_per_worker
    if wanted > cpus or (needs_data_cpu and wanted > cpus - 1):
        spare = ", of which one must stay free for reading images" if needs_data_cpu else ""
        raise ConfigError(
            f"scaling.num_workers * scaling.cpus_per_worker is {wanted:g}, but the cluster has {cpus:g} CPUs{spare}. Lower one of them."
        )
    gpus = resources.get("GPU", 0.0)
    if scaling.use_gpu and scaling.min_workers > gpus:
        raise ConfigError(
            f"scaling.num_workers is {scaling.min_workers}, but the cluster has {gpus:g} GPUs. Lower it or use_gpu=false."
        )
