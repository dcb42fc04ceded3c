"""Saves a training of either stage while it goes on: ranks write their parts, publish them beside the steps, and rank 0 commits."""

import logging
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from cluster import checkpoints
from cluster.rank_messages import wait_for_all
from cluster.staging import Staging, memory_has_room, remove_abandoned
from pipeline import storage
from stages import files
from stages.errors import StorageError

logger = logging.getLogger(__name__)

Entries = list[dict[str, Any]]


class Checkpointer:
    """One rank's part of saving a run. Every rank must make the same calls in the same order.

    `start` takes the state, into memory where it has room; only then training waits. A thread writes or uploads and hashes the
    files. `finish` commits when every rank is through: to be called once all `has_published`, or at any time to wait for it.

    Args:
        run_path: of the run.
        attempt: unique to this group of processes.
        save: writes this rank's part of the state into a local folder of its own. No two ranks write a file of the same name.
        saved_bytes: that `save` writes at most.
        device: for collectives.
        keep_alive: called while `finish` waits for a slow store, as long as all ranks live.
    """

    def __init__(
        self,
        run_path: str,
        attempt: str,
        save: Callable[[str], None],
        *,
        saved_bytes: int,
        device: torch.device,
        keep_alive: Callable[[], None],
    ):
        self.run_path, self.attempt, self.device, self.keep_alive = run_path, attempt, device, keep_alive
        self._save, self._saved_bytes = save, saved_bytes
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self._publisher = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint-publisher")
        self._published: Future[Entries] | None = None
        self._path = ""
        self._describe: Callable[[Entries], dict[str, Any]] = lambda files: {}
        remove_abandoned()

    @property
    def has_published(self) -> bool:
        """Whether this rank's part of the pending checkpoint is where it belongs, or failed to get there."""
        return self._published is not None and self._published.done()

    def start(self, step: int, describe: Callable[[Entries], dict[str, Any]]) -> None:
        """Writes this rank's part of the state after `step` steps and starts to publish it.

        Args:
            step: optimizer steps made.
            describe: on rank 0, what COMMIT.json says, from the entries of all files.

        Raises:
            StorageError: a disk that is full or fails.
        """
        assert self._published is None, "a checkpoint is pending"
        self._path = checkpoints.checkpoint_path(self.run_path, step, self.attempt)
        self._describe = describe
        in_memory = self._fits_in_memory()
        with _storage_errors(self.run_path):
            staging = Staging(in_memory) if in_memory or not storage.is_local(self._path) else None
            folder = os.path.join(self._path, f"rank-{self.rank}") if staging is None else staging.path
            files.make_folder(folder)
            self._save(folder)
        self._published = self._publisher.submit(self._publish, folder, staging)

    def _fits_in_memory(self) -> bool:
        """Whether every rank's files do; all ranks get the same answer."""
        num_ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", self.world_size))
        fits = torch.tensor(float(memory_has_room(num_ranks_here * self._saved_bytes)), device=self.device)
        dist.all_reduce(fits, dist.ReduceOp.MIN)
        return bool(fits.item())

    def _publish(self, folder: str, staging: Staging | None) -> Entries:
        """Moves the files that this rank wrote from its folder to where they belong and returns their entries. A rank lists no folder that
        others write into: with NFS it may not see yet what is in there."""
        put = files.move if staging is None else lambda source, target: storage.put_file_if_absent(target, source)
        try:
            with _storage_errors(self.run_path):
                sources = storage.list_files(folder)
                entries = [checkpoints.file_entry(source, os.path.relpath(source, folder)) for source in sources]
                for source, entry in zip(sources, entries):
                    put(source, storage.join(self._path, entry["path"]))
                if staging is None:
                    _remove_emptied(folder)
            return entries
        finally:
            if staging is not None:
                staging.close()

    def finish(self) -> checkpoints.Commit | None:
        """Waits for every rank and commits; None when nothing is pending.

        Raises:
            StorageError: a rank could not publish; nothing is committed.
        """
        if self._published is None:
            return None
        wait_for_all(self._published, self.device, self.keep_alive)
        outcome: Any
        try:
            outcome = self._published.result()
        except StorageError as error:
            outcome = error
        self._published = None
        outcomes: list[Any] = [None] * self.world_size
        dist.all_gather_object(outcomes, outcome)
        box: list[Any] = [None]
        if self.rank == 0:
            box = [_attempt(lambda: self._commit(outcomes))]
        dist.broadcast_object_list(box, src=0)
        if isinstance(box[0], StorageError):
            raise box[0]
        return box[0]

    def _commit(self, outcomes: list[Entries | StorageError]) -> checkpoints.Commit:
        entries: Entries = []
        for outcome in outcomes:
            if isinstance(outcome, StorageError):
                raise outcome
            entries += outcome
        assert len({entry["path"] for entry in entries}) == len(entries), "two ranks wrote a file of the same name"
        with _storage_errors(self.run_path):
            return checkpoints.write_commit(self._path, self._describe(entries))


def _remove_emptied(folder: str) -> None:
    """Removes a folder and those in it. OSError if a file is left, which would be missing in the checkpoint."""
    for parent, _, _ in os.walk(folder, topdown=False):
        os.rmdir(parent)


def _attempt(work: Callable[[], Any]) -> Any:
    """What `work` returns, or the StorageError it raises, so that other ranks can be told."""
    try:
        return work()
    except StorageError as error:
        return error


@contextmanager
def _storage_errors(run_path: str) -> Iterator[None]:
    """Names the run in faults of a disk or store. torch's writer says RuntimeError where a disk is full."""
    try:
        yield
    except StorageError:
        raise
    except (OSError, RuntimeError) as error:
        raise StorageError(
            f"run.path is {run_path}, but a checkpoint cannot be written there ({error}). Make room or mend the storage, and run the "
            f"same command again: it goes on from the last commit."
        ) from error
