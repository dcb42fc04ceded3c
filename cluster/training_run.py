"""One rank of a training run of either stage: steps, commits, the way on from a commit and the way back from a fault.

What a step computes is the stage's; here is what makes it a run. All ranks make the same decisions. The rows, learning rate and
random draws of a step are functions of the step, so the state of a run is the stage's state, one integer and the batches it leaves out.
"""

import itertools
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist

from cluster import checkpoints
from cluster.checkpointer import Checkpointer
from cluster.history import History
from cluster.rank_messages import RankMessage, broadcast, exchange, work_together
from cluster.spikes import find_fault, find_not_finite
from cluster.step_timer import CHECKPOINT, DATA, StepTimer
from cluster.train_metrics import TrainMetrics
from cluster.watchdog import Watchdog
from stages.errors import TesseraError

logger = logging.getLogger(__name__)

LOOK_AROUND_SECONDS = 5.0  # how often ranks ask whether to leave


class LoadedBatch(Protocol):
    """What a rank consumes in a step, and the digest of the rows it stands for."""

    step: int
    digest: int


class Stage(Protocol):
    """What a run trains."""

    device: torch.device

    def iterate(self, start_step: int, stop_step: int, skipped: Sequence[tuple[int, int]]) -> Iterator[Any]:
        """This rank's share of every step, a LoadedBatch."""

    def step(self, loaded: Any) -> tuple[float, dict[str, float]]:
        """Trains on it. Returns this rank's loss, to be added up over the ranks, and numbers for the record, the same on every rank."""

    def record(self, loaded: Any, loss_sum: float, digests: list[int], numbers: dict[str, float]) -> dict[str, Any]:
        """The log record of the step, with at least `step`, `batch`, `loss`, `digests` and `grad_norm`."""

    def load(self, commit: checkpoints.Commit) -> None:
        """Goes to where a commit was. ArtefactError if it is another run's."""

    def settle(self) -> None:
        """Waits until all that was trained on is checked."""

    def measure(self) -> dict[str, float]:
        """Numbers that are measured before a commit and stored in it."""


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """How a run goes: where its commits are, how long it is, when it commits and what it does about faults.

    Attributes:
        section: of the configuration, for messages.
    """

    run_path: str
    section: str
    num_steps: int
    checkpoint_every_steps: int
    checkpoint_every_seconds: float | None
    retention: checkpoints.Retention
    spike_threshold: float
    max_rollbacks: int


class TrainingRun:
    """One rank of a run.

    Args:
        stage: what is trained.
        plan: how.
        history: of the run, empty.
        checkpointer: saves the stage.
        metrics: shows the steps.
        should_leave: asked by all ranks together every few seconds; True makes them commit and return early.
        watchdog: fed with every step.
        timer: of the steps' parts.
    """

    def __init__(
        self,
        stage: Stage,
        plan: RunPlan,
        history: History,
        checkpointer: Checkpointer,
        metrics: TrainMetrics,
        *,
        should_leave: Callable[[], bool],
        watchdog: Watchdog,
        timer: StepTimer,
    ):
        self.stage, self.plan, self.history, self.checkpointer = stage, plan, history, checkpointer
        self.metrics, self.should_leave, self.watchdog, self.timer = metrics, should_leave, watchdog, timer
        self.rank = dist.get_rank()
        self.num_rollbacks = 0  # since the last commit beyond all faults
        self.looked_at = self.committed_at = time.monotonic()

    def go(self, seconds_to_start: dict[str, float]) -> None:
        """Resumes, then steps and commits until the run has all its steps, or is asked to leave."""
        try:
            began = time.monotonic()
            self._resume()
            seconds = seconds_to_start | {"checkpoint": time.monotonic() - began}
            self.metrics.start(self.history.step, seconds)
            self.timer.finish()  # what came before is no part of the first step
            logger.info("Ready: %s", ", ".join(f"{name} {value:.2f} s" for name, value in seconds.items()))
            while self._run_stretch():
                pass
            self._finish_commit()
        finally:
            self.metrics.close()

    def _resume(self) -> None:
        path = self._find(lambda: _latest_path(self.plan.run_path))
        if path is None:
            return
        commit = checkpoints.open_commit(path)
        self.stage.load(commit)
        self.history.restore(commit)
        self._find(lambda: checkpoints.set_aside_damaged(self.plan.run_path, commit))
        logger.info("Resuming from %s", commit.path)

    def _find(self, find: Callable[[], str | None]) -> str | None:
        """What `find` gives on rank 0, on every rank. It may hash many bytes."""
        found = work_together(find if self.rank == 0 else lambda: None, self.stage.device, self.watchdog.feed)
        return broadcast(found)

    def _run_stretch(self) -> bool:
        """Steps to the end, to a request to leave, or to a fault; whether the run goes on after undoing it."""
        plan, timer, history = self.plan, self.timer, self.history
        steps = self.stage.iterate(history.step, plan.num_steps, history.skipped)
        for loaded in timer.each(DATA, steps):
            record, messages = self._step(loaded)
            self.watchdog.feed()
            fault = find_fault(record["loss"], record["grad_norm"], history.recent_losses, plan.spike_threshold)
            fault = fault or find_not_finite(record)
            if fault is not None:
                self._roll_back(record, fault)
                return True
            history.append(record)
            if all(message.has_published for message in messages):
                self._finish_commit()
            is_leaving = messages[0].looks_around and self.should_leave()
            is_due = history.step % plan.checkpoint_every_steps == 0 or messages[0].wants_commit
            if is_due or is_leaving or history.step == plan.num_steps:
                self._start_commit()
            self.metrics.record(record, timer.finish())
            if is_leaving:
                return False
        return False

    def _step(self, loaded: LoadedBatch) -> tuple[dict[str, Any], list[RankMessage]]:
        loss, numbers = self.stage.step(loaded)
        messages = exchange(self._message(loss, loaded.digest), self.stage.device)
        digests = [message.digest for message in messages]
        return self.stage.record(loaded, sum(message.loss for message in messages), digests, numbers), messages

    def _message(self, loss: float, digest: int) -> RankMessage:
        now, every = time.monotonic(), self.plan.checkpoint_every_seconds
        looks_around = self.rank == 0 and now - self.looked_at > LOOK_AROUND_SECONDS
        if looks_around:
            self.looked_at = now
        return RankMessage(
            loss=loss,
            digest=digest,
            has_published=self.checkpointer.has_published,
            looks_around=looks_around,
            wants_commit=self.rank == 0 and every is not None and now - self.committed_at > every,
        )

    def _start_commit(self) -> None:
        """Saves the state; the ranks publish it beside the next steps. Not before all rows that were trained on are checked."""
        history, attempt = self.history, self.checkpointer.attempt
        with self.timer.part(CHECKPOINT):
            self._finish_commit()
            self.stage.settle()
            measured = self.stage.measure()
            step, records = history.step, history.take_records()
            self.checkpointer.start(
                step, lambda files: history.commit_content(step, attempt, records, measured, files)
            )
        self.committed_at = time.monotonic()
        self.watchdog.feed()

    def _finish_commit(self) -> None:
        """Waits until the pending checkpoint, if any, is committed."""
        with self.timer.part(CHECKPOINT):
            commit = self.checkpointer.finish()
        if commit is None:
            return
        self.history.parent = commit
        if commit.step > self.history.last_fault:  # one that makes undone steps again proves nothing
            self.num_rollbacks = 0
        self.watchdog.feed()
        if self.rank == 0:
            measured = commit.content["measured"]
            checkpoints.prune(self.plan.run_path, self.plan.retention)
            self.metrics.commit(commit.step, **measured)
            text = "".join(f", {name} {value:.4f}" for name, value in measured.items())
            logger.info("Committed step %d%s", commit.step, text)

    def _roll_back(self, record: dict[str, Any], fault: str) -> None:
        """Undoes all steps since a commit and leaves out the batches that led to the fault."""
        self._finish_commit()
        plan = self.plan
        self.num_rollbacks += 1
        path = self._find(lambda: _earlier_path(plan.run_path, self.num_rollbacks))
        if path is None or self.num_rollbacks > plan.max_rollbacks:
            raise TesseraError(
                f"Step {record['step']} has {fault}, and the run went back {self.num_rollbacks - 1} times without a commit beyond the "
                f"steps that failed ({plan.section}.max_rollbacks is {plan.max_rollbacks}). Lower the learning rate or use "
                f"{plan.section}.precision=fp32, and run the same command again: commits are untouched."
            )
        commit = checkpoints.open_commit(path)
        self.stage.load(commit)
        event = self.history.undo(commit, record, fault)
        if self.rank == 0:
            checkpoints.retire_after(plan.run_path, commit.step)
        logger.warning("Undone, and going on from step %d: %s", commit.step, event)
        self.metrics.rollback(commit.step)
        self.timer.finish()


def _latest_path(run_path: str) -> str | None:
    commit = checkpoints.latest_commit(run_path)
    return None if commit is None else commit.path


def _earlier_path(run_path: str, number: int) -> str | None:
    """The newest sound commit, or for later numbers the ones before it, since what came again may be in the newest already."""
    newest_first = reversed(checkpoints.list_commits(run_path))
    sound = (commit for commit in newest_first if not checkpoints.commit_problems(commit))
    found = list(itertools.islice(sound, number))
    return found[-1].path if found else None
