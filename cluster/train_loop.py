"""What one worker of the second-stage job does: the training loop, its commits, its resume and its way back from a fault.

The row order, dropout, learning rate and condition dropping of a step are functions of the step, so the state of a run is its
weights, its optimizer, one integer and the batches it leaves out.
"""

import logging
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from cluster import checkpoints, run_log
from cluster.checkpointer import Checkpointer
from cluster.deepspeed_engine import build_engine, learning_rate, set_learning_rate
from cluster.estimates import row_flop
from cluster.history import History
from cluster.peak_flops import gpu_peak_flops, measured_peak_flops
from cluster.rank_messages import RankMessage, exchange
from cluster.resume import check_resumable, load_commit
from cluster.spikes import find_fault
from cluster.step_timer import CHECKPOINT, DATA, StepTimer
from cluster.train_metrics import TrainMetrics
from cluster.train_options import TrainJobOptions, dataset_transformer_config
from cluster.train_step import train_step
from cluster.validation import Validation
from cluster.watchdog import Watchdog
from pipeline.loader import CodeLoader, LoadedStep, dataset_order, open_dataset
from stages.errors import TesseraError
from stages.memory import keep_freed_memory

logger = logging.getLogger(__name__)

LOOK_AROUND_SECONDS = 5.0  # how often ranks ask whether to leave


def train_worker(options: TrainJobOptions, num_threads: int, should_leave: Callable[[], bool] = lambda: False) -> None:
    """Trains from the run's latest commit, or from the start, to `train.num_steps`. Runs on every rank of a process group.

    Args:
        options: of the job.
        num_threads: for torch.
        should_leave: asked by all ranks together every few seconds; True makes them commit and return early.
    """
    keep_freed_memory()
    torch.set_num_threads(num_threads)
    torch.use_deterministic_algorithms(options.train.deterministic)
    watchdog = Watchdog(options.scaling.hang_timeout_seconds)
    try:
        with StepTimer(torch.device("cuda") if torch.cuda.is_available() else None) as timer:
            Trainer(options, num_threads, should_leave, watchdog, timer).run()
    finally:
        watchdog.stop()


class Trainer:
    """One rank of a training run. All ranks make the same decisions."""

    def __init__(
        self,
        options: TrainJobOptions,
        num_threads: int,
        should_leave: Callable[[], bool],
        watchdog: Watchdog,
        timer: StepTimer,
    ):
        self.options, self.should_leave, self.watchdog, self.timer = options, should_leave, watchdog, timer
        train, began = options.train, time.monotonic()
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.dataset = open_dataset(options.codes, verify=False)
        self.config = dataset_transformer_config(options, self.dataset)
        self.history = History(options, self.dataset, self.config)
        self.loader = self._open_loader()
        self.validation = None
        if train.validation_path is not None:
            micro = train.micro_batch_size
            self.validation = Validation(train.validation_path, train.validation_rows, self.dataset, micro)
        opened = time.monotonic()
        self.engine = build_engine(
            self.config, options.run.seed, train, options.optim, options.deepspeed, self.world_size
        )
        self.seconds_to_start = {"dataset": opened - began, "engine": time.monotonic() - opened}
        attempt = _broadcast(checkpoints.new_attempt())
        self.checkpointer = Checkpointer(
            options.run.path,
            attempt,
            self.engine,
            saves_average=options.optim.weight_average_decay > 0.0,
            keep_alive=watchdog.feed,
        )
        self.metrics = self._open_metrics(attempt, num_threads)
        self.num_rollbacks = 0  # since the last commit
        self.looked_at = self.committed_at = time.monotonic()

    def _open_loader(self) -> CodeLoader:
        options = self.options
        order = dataset_order(
            self.dataset,
            seed=options.run.seed,
            global_batch_size=options.train.global_batch_size,
            window_groups=options.train.shuffle_window,
        )
        return CodeLoader(
            self.dataset,
            order,
            rank=self.rank,
            world_size=self.world_size,
            micro_batch_size=options.train.micro_batch_size,
            cond_drop_prob=options.conditioning.cond_drop_prob,
        )

    def _open_metrics(self, attempt: str, num_threads: int) -> TrainMetrics:
        train = self.options.train
        if torch.cuda.is_available():
            peak = gpu_peak_flops(torch.cuda.get_device_name())
        else:
            dtype = torch.bfloat16 if train.precision == "bf16" else torch.float32
            peak = measured_peak_flops(dtype, num_threads)
        return TrainMetrics(
            self.options.run.path,
            attempt,
            is_writer=self.rank == 0,
            num_steps=train.num_steps,
            log_every_steps=train.log_every_steps,
            codes_per_step=train.global_batch_size * self.dataset.num_codes,
            flop_per_step=row_flop(self.config) * train.global_batch_size,
            peak_flops=None if peak is None else peak * self.world_size,
        )

    def run(self) -> None:
        """Resumes, then steps and commits until the run has `train.num_steps`, or is asked to leave."""
        try:
            began = time.monotonic()
            self._resume()
            seconds = self.seconds_to_start | {"checkpoint": time.monotonic() - began}
            self.metrics.start(self.history.step, seconds)
            self.timer.finish()  # what came before is no part of the first step
            logger.info("Ready: %s", ", ".join(f"{name} {value:.2f} s" for name, value in seconds.items()))
            while self._run_stretch():
                pass
            self._finish_commit()
        finally:
            self.metrics.close()

    def _resume(self) -> None:
        path = _broadcast(_latest_path(self.options.run.path) if self.rank == 0 else None)
        if path is None:
            return
        commit = checkpoints.open_commit(path)
        check_resumable(commit, self.options, self.dataset, self.config)
        load_commit(self.engine, commit)
        self.history.restore(commit)
        logger.info("Resuming from %s", commit.path)

    def _run_stretch(self) -> bool:
        """Steps to the end, to a request to leave, or to a fault; whether the run goes on after undoing it."""
        train, timer, history = self.options.train, self.timer, self.history
        self.engine.train()
        steps = self.loader.iterate(history.step, train.num_steps, history.skipped)
        for loaded in timer.each(DATA, steps):
            record, messages = self._train_step(loaded)
            self.watchdog.feed()
            fault = find_fault(record["loss"], record["grad_norm"], history.recent_losses, train.spike_threshold)
            if fault is not None:
                self._roll_back(record, fault)
                return True
            history.append(record)
            if all(message.has_published for message in messages):
                self._finish_commit()
            is_leaving = messages[0].looks_around and self.should_leave()
            is_due = history.step % train.checkpoint_every_steps == 0 or messages[0].wants_commit
            if is_due or is_leaving or history.step == train.num_steps:
                self._start_commit()
            self.metrics.record(record, timer.finish())
            if is_leaving:
                return False
        return False

    def _train_step(self, loaded: LoadedStep) -> tuple[dict[str, Any], list[RankMessage]]:
        options, engine, num_codes = self.options, self.engine, self.dataset.num_codes
        rate = learning_rate(options.optim, options.train, loaded.step)
        set_learning_rate(engine, rate)
        loss, norm = train_step(
            engine,
            loaded,
            self.timer,
            num_codes=num_codes,
            seed=options.run.seed,
            rank=self.rank,
            world_size=self.world_size,
        )
        messages = exchange(self._message(loss, loaded.digest), engine.device)
        mean = sum(message.loss for message in messages) / (loaded.num_valid * num_codes)
        digests = [message.digest for message in messages]
        record = run_log.step_record(loaded.step, loaded.batch, mean, digests, learning_rate=rate, grad_norm=norm)
        return record, messages

    def _message(self, loss: float, digest: int) -> RankMessage:
        now, every = time.monotonic(), self.options.train.checkpoint_every_seconds
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
            self.loader.settle()
            measured = {} if self.validation is None else {"validation_nll": self.validation.measure(self.engine)}
            step, records = history.step, history.records
            history.records = []
            self.checkpointer.start(
                step, lambda files: history.commit_content(step, attempt, records, measured, self.world_size, files)
            )
        self.committed_at = time.monotonic()
        self.watchdog.feed()

    def _finish_commit(self) -> None:
        """Waits until the pending checkpoint, if any, is committed."""
        with self.timer.part(CHECKPOINT):
            commit = self.checkpointer.finish()
        if commit is None:
            return
        self.history.parent, self.num_rollbacks = commit, 0
        self.watchdog.feed()
        if self.rank == 0:
            train, measured = self.options.train, commit.content["measured"]
            retention = checkpoints.Retention(
                newest=train.keep_checkpoints, every_steps=train.keep_every_steps, best=train.keep_best
            )
            checkpoints.prune(self.options.run.path, retention)
            self.metrics.commit(commit.step, **measured)
            text = "".join(f", {name} {value:.4f}" for name, value in measured.items())
            logger.info("Committed step %d%s", commit.step, text)

    def _roll_back(self, record: dict[str, Any], fault: str) -> None:
        """Undoes all steps since a commit and leaves out the batches that led to the fault."""
        self._finish_commit()
        train, run_path = self.options.train, self.options.run.path
        self.num_rollbacks += 1
        path = _broadcast(_earlier_path(run_path, self.num_rollbacks) if self.rank == 0 else None)
        if path is None or self.num_rollbacks > train.max_rollbacks:
            raise TesseraError(
                f"Step {record['step']} has {fault}, and the run went back {self.num_rollbacks - 1} times since its last commit "
                f"(train.max_rollbacks is {train.max_rollbacks}). Lower optim.learning_rate or use train.precision=fp32, and run "
                f"the same command again: commits are untouched."
            )
        commit = checkpoints.open_commit(path)
        load_commit(self.engine, commit)
        event = self.history.undo(commit, record, fault)
        if self.rank == 0:
            checkpoints.retire_after(run_path, commit.step)
        logger.warning("Undone, and going on from step %d: %s", commit.step, event)
        self.metrics.rollback(commit.step)
        self.timer.finish()


def _latest_path(run_path: str) -> str | None:
    commit = checkpoints.latest_commit(run_path)
    return None if commit is None else commit.path


def _earlier_path(run_path: str, number: int) -> str | None:
    """The newest sound commit, or for later numbers the ones before it, since what came again may be in the newest already."""
    commits = checkpoints.list_commits(run_path)
    sound = [commit for commit in commits if not checkpoints.commit_problems(commit)]
    return sound[-min(number, len(sound))].path if sound else None


def _broadcast(value: Any) -> Any:
    """Rank 0's value on every rank."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]
