"""What one worker of the second-stage job does: a run of the transformer on a code dataset."""

import functools
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from cluster import checkpoints, run_log
from cluster.checkpointer import Checkpointer
from cluster.deepspeed_engine import build_engine, learning_rate, set_learning_rate
from cluster.engine_state import save_engine, saved_bytes
from cluster.estimates import row_flop
from cluster.history import History
from cluster.peak_flops import gpu_peak_flops, measured_peak_flops
from cluster.rank_messages import broadcast
from cluster.resume import check_resumable, commit_facts, load_commit
from cluster.step_timer import StepTimer
from cluster.train_metrics import TrainMetrics
from cluster.train_options import TrainJobOptions, dataset_transformer_config, training_conditions
from cluster.train_step import train_step
from cluster.training_run import RunPlan, TrainingRun
from cluster.validation import open_validation
from cluster.watchdog import Watchdog
from pipeline.loader import CodeLoader, LoadedStep, dataset_order, open_dataset
from stages.memory import keep_freed_memory

logger = logging.getLogger(__name__)


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
    if options.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS may sum in any order
    device = torch.device("cuda") if torch.cuda.is_available() else None
    with Watchdog(options.scaling.hang_timeout_seconds) as watchdog, StepTimer(device) as timer:
        _run(options, num_threads, should_leave, watchdog, timer)


def _run(
    options: TrainJobOptions, num_threads: int, should_leave: Callable[[], bool], watchdog: Watchdog, timer: StepTimer
) -> None:
    stage = TransformerStage(options, timer, keep_alive=watchdog.feed)
    facts = commit_facts(options, stage.dataset, stage.conditions, stage.config, stage.world_size)
    attempt = broadcast(checkpoints.new_attempt())
    averages = options.optim.weight_average_decay > 0.0
    checkpointer = Checkpointer(
        options.run.path,
        attempt,
        functools.partial(save_engine, stage.engine, saves_average=averages),
        saved_bytes=saved_bytes(stage.engine, saves_average=averages),
        device=stage.device,
        keep_alive=watchdog.feed,
    )
    run = TrainingRun(
        stage,
        _plan(options),
        History(options.run.path, options.train.skip_batches, facts),
        checkpointer,
        _open_metrics(options, stage, attempt, num_threads),
        should_leave=should_leave,
        watchdog=watchdog,
        timer=timer,
    )
    run.go(stage.seconds_to_start)


def _plan(options: TrainJobOptions) -> RunPlan:
    train = options.train
    return RunPlan(
        run_path=options.run.path,
        section="train",
        num_steps=train.num_steps,
        checkpoint_every_steps=train.checkpoint_every_steps,
        checkpoint_every_seconds=train.checkpoint_every_seconds,
        retention=checkpoints.Retention(
            newest=train.keep_checkpoints, every_steps=train.keep_every_steps, best=train.keep_best
        ),
        spike_threshold=train.spike_threshold,
        max_rollbacks=train.max_rollbacks,
    )


def _open_metrics(options: TrainJobOptions, stage: "TransformerStage", attempt: str, num_threads: int) -> TrainMetrics:
    train = options.train
    if torch.cuda.is_available():
        peak = gpu_peak_flops(torch.cuda.get_device_name()) if train.precision == "bf16" else None  # known in bf16 only
    else:
        dtype = torch.bfloat16 if train.precision == "bf16" else torch.float32
        peak = measured_peak_flops(dtype, num_threads)
    return TrainMetrics(
        options.run.path,
        attempt,
        is_writer=stage.rank == 0,
        num_steps=train.num_steps,
        log_every_steps=train.log_every_steps,
        codes_per_step=train.global_batch_size * stage.dataset.num_codes,
        flop_per_step=row_flop(stage.config) * train.global_batch_size,
        peak_flops=None if peak is None else peak * stage.world_size,
    )


class TransformerStage:
    """What a second-stage run trains: a DeepSpeed engine on one rank's rows of a code dataset.

    Args:
        options: of the job.
        timer: of the steps' parts.
        keep_alive: called while a checkpoint is fetched, as long as all ranks live.
    """

    def __init__(self, options: TrainJobOptions, timer: StepTimer, keep_alive: Callable[[], None]):
        self.options, self.timer, self.keep_alive = options, timer, keep_alive
        train, began = options.train, time.monotonic()
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.dataset = open_dataset(options.codes, verify=False)
        self.conditions = training_conditions(options, self.dataset, verify=False)
        self.config = dataset_transformer_config(options, self.dataset, self.conditions)
        self.loader = self._open_loader()
        self.validation = open_validation(options, self.dataset, self.conditions)
        opened = time.monotonic()
        self.engine = build_engine(
            self.config, options.run.seed, train, options.optim, options.deepspeed, self.world_size
        )
        self.device = self.engine.device
        self.seconds_to_start = {"dataset": opened - began, "engine": time.monotonic() - opened}

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
            conditions=self.conditions,
        )

    def iterate(self, start_step: int, stop_step: int, skipped: Sequence[tuple[int, int]]) -> Iterator[LoadedStep]:
        self.engine.train()
        return self.loader.iterate(start_step, stop_step, skipped)

    def step(self, loaded: LoadedStep) -> tuple[float, dict[str, float]]:
        options = self.options
        rate = learning_rate(options.optim, options.train, loaded.step)
        set_learning_rate(self.engine, rate)
        loss, norm = train_step(
            self.engine,
            loaded,
            self.timer,
            num_codes=self.dataset.num_codes,
            seed=options.run.seed,
            rank=self.rank,
            world_size=self.world_size,
        )
        return loss, {"learning_rate": rate, "grad_norm": norm}

    def record(
        self, loaded: LoadedStep, loss_sum: float, digests: list[int], numbers: dict[str, float]
    ) -> dict[str, Any]:
        mean = loss_sum / (loaded.num_valid * self.dataset.num_codes)
        return run_log.step_record(loaded.step, loaded.batch, mean, digests, **numbers)

    def load(self, commit: checkpoints.Commit) -> None:
        check_resumable(commit, self.options, self.dataset, self.conditions, self.config)
        load_commit(self.engine, commit, self.keep_alive)

    def settle(self) -> None:
        self.loader.settle()

    def measure(self) -> dict[str, float]:
        return {} if self.validation is None else {"validation_nll": self.validation.measure(self.engine)}
