"""What one worker of the first-stage job does: a run of the tokenizer on streamed images."""

import functools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ray
import torch
import torch.distributed as dist
from ray.train.torch import get_device
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cluster import checkpoints, run_log
from cluster.checkpointer import Checkpointer
from cluster.history import History
from cluster.node_folder import fetched
from cluster.rank_messages import broadcast
from cluster.step_timer import StepTimer
from cluster.tokenizer_history import TrainingInputs, check_resumable, commit_facts, image_reader
from cluster.tokenizer_options import TokenizerJobOptions, num_steps, training_path
from cluster.train_metrics import TrainMetrics
from cluster.train_step import step_seed
from cluster.training_run import RunPlan, TrainingRun
from cluster.watchdog import Watchdog
from pipeline.encoding import use_parity_mode
from pipeline.image_loader import ImageLoader, LoadedImages
from stages.first_stage.artefact import own_metadata
from stages.first_stage.discriminator import build_discriminator
from stages.first_stage.pixels import to_input
from stages.first_stage.quantizers.health import codebook_health
from stages.first_stage.quantizers.ranks import copy_from_first_rank, sum_over_ranks
from stages.first_stage.quantizers.revival import is_time_to_revive
from stages.first_stage.tokenizer import Tokenizer
from stages.first_stage.tokenizer_config import num_channels, tokenizer_config
from stages.first_stage.training import FirstStageTrainer
from stages.memory import keep_freed_memory

STATE, RESULT = "state.pt", "tokenizer.safetensors"  # everything to go on from; the weights that training is for


def tokenizer_worker(
    options: TokenizerJobOptions,
    num_threads: int,
    should_leave: Callable[[], bool] = lambda: False,
    *,
    inputs: TrainingInputs,
) -> None:
    """Trains from the latest commit, or from the start, until the job has seen `tokenizer_train.num_samples` images.

    Args:
        options: of the job.
        num_threads: for torch.
        should_leave: asked by all ranks together every few seconds; True makes them commit and return early.
        inputs: from the driver.
    """
    keep_freed_memory()
    torch.set_num_threads(num_threads)
    if options.tokenizer_train.precision == "fp32":
        use_parity_mode()
    device = torch.device("cuda") if torch.cuda.is_available() else None
    with Watchdog(options.scaling.hang_timeout_seconds) as watchdog, StepTimer(device) as timer:
        _run(options, inputs, should_leave, watchdog, timer)


def _run(
    options: TokenizerJobOptions,
    inputs: TrainingInputs,
    should_leave: Callable[[], bool],
    watchdog: Watchdog,
    timer: StepTimer,
) -> None:
    train, run_path, began = options.tokenizer_train, training_path(options.tokenizer.path), time.monotonic()
    stage = TokenizerStage(options, inputs, keep_alive=watchdog.feed)
    attempt = broadcast(checkpoints.new_attempt())
    facts = commit_facts(options, inputs, stage.world_size)
    metrics = TrainMetrics(
        run_path,
        attempt,
        is_writer=stage.rank == 0,
        num_steps=num_steps(train),
        log_every_steps=train.log_every_steps,
        codes_per_step=train.global_batch_size,
        flop_per_step=0.0,
        peak_flops=None,
        unit="images",
        loss_unit="",
    )
    plan = RunPlan(
        run_path=run_path,
        section="tokenizer_train",
        num_steps=num_steps(train),
        checkpoint_every_steps=train.checkpoint_every_steps,
        checkpoint_every_seconds=None,
        retention=checkpoints.Retention(newest=train.keep_checkpoints),
        spike_threshold=train.spike_threshold,
        max_rollbacks=train.max_rollbacks,
    )
    run = TrainingRun(
        stage,
        plan,
        History(run_path, train.skip_batches, facts),
        Checkpointer(
            run_path,
            attempt,
            stage.save,
            saved_bytes=stage.saved_bytes,
            device=stage.device,
            keep_alive=watchdog.feed,
        ),
        metrics,
        should_leave=should_leave,
        watchdog=watchdog,
        timer=timer,
    )
    run.go({"networks": time.monotonic() - began})


class TokenizerStage:
    """What a first-stage run trains: the tokenizer and its adversary, on one rank's images.

    Args:
        options: of the job.
        inputs: images and networks, prepared by the driver.
        keep_alive: called while a checkpoint is fetched, as long as all ranks live.
    """

    def __init__(self, options: TokenizerJobOptions, inputs: TrainingInputs, keep_alive: Callable[[], None]):
        self.options, self.inputs, self.keep_alive = options, inputs, keep_alive
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.device = get_device()
        self.trainer = self._build_trainer()
        self.loader = ImageLoader(
            image_reader(options, inputs),
            inputs.table,
            rank=self.rank,
            world_size=self.world_size,
            cpus_per_rank=options.scaling.cpus_per_worker,
        )

    def _build_trainer(self) -> FirstStageTrainer:
        options, train = self.options, self.options.tokenizer_train
        torch.manual_seed(options.run.seed)
        tokenizer = Tokenizer(tokenizer_config(options.tokenizer, options.images)).to(self.device)
        discriminator = build_discriminator(
            train, num_channels(options.tokenizer, options.images), options.images.size
        )
        perceptual = None if self.inputs.perceptual is None else ray.get(self.inputs.perceptual)
        return FirstStageTrainer(
            tokenizer,
            None if discriminator is None else discriminator.to(self.device),
            train,
            perceptual=None if perceptual is None else perceptual.to(self.device),
            is_labels=options.tokenizer.num_labels is not None,
            wrap=self._data_parallel,
            all_reduce_mean=self._all_reduce_mean,
        )

    def _data_parallel(self, module: nn.Module) -> nn.Module:
        if self.world_size == 1:
            return module
        return DistributedDataParallel(
            module,
            device_ids=[self.device] if self.device.type == "cuda" else None,
            forward_sync_buffers=False,  # they are computed from all ranks' data, the same everywhere
            find_unused_parameters=True,  # else buckets change after the first step, and with them sums after a resume
        )

    def _all_reduce_mean(self, tensor: Tensor) -> None:
        if self.world_size > 1:
            dist.all_reduce(tensor)
            tensor /= self.world_size

    def iterate(self, start_step: int, stop_step: int, skipped: Sequence[tuple[int, int]]) -> Iterator[LoadedImages]:
        return self.loader.iterate(start_step, stop_step, skipped)

    def step(self, loaded: LoadedImages) -> tuple[float, dict[str, float]]:
        train, step = self.options.tokenizer_train, loaded.step
        torch.manual_seed(step_seed(self.options.run.seed, step, self.rank))
        num_seen = step * train.global_batch_size
        metrics = self.trainer.step(self._inputs_of(loaded), num_seen)
        values = torch.stack([value.double() for value in metrics.values()])
        loss = values[list(metrics).index("reconstruction")].item()
        self._all_reduce_mean(values)
        numbers = dict(zip(metrics, values.tolist())) | {"learning_rate": self.trainer.learning_rate(num_seen)}
        return loss, numbers | self._codebook_numbers(step)

    def _inputs_of(self, loaded: LoadedImages) -> Tensor:
        pixels = torch.tensor(loaded.pixels).to(self.device, non_blocking=True)  # a copy: Ray's memory is read-only
        return to_input(pixels, self.options.tokenizer.num_labels)

    def _codebook_numbers(self, step: int) -> dict[str, float]:
        """Codebook health since the last logged step, at steps that are logged; revives dead codes when it is time."""
        train, health_K = self.options.tokenizer_train, self.trainer.health_counts_K
        num_done, total = step + 1, num_steps(train)
        is_logged = num_done % train.log_every_steps == 0 or num_done == total
        revives = is_time_to_revive(train, num_done, total)
        if not (is_logged or revives):
            return {}
        self._pool_counts()
        if revives:
            self.trainer.revive_dead_codes()
        if not is_logged:
            return {}
        health = codebook_health(copy_from_first_rank(health_K.clone()))
        health_K.zero_()
        return {f"codebook_{name}": value for name, value in health._asdict().items()}

    def _pool_counts(self) -> None:
        """Leaves on rank 0 the counts of all ranks, and zero on others: what they add up to stays the same."""
        for counts_K in (self.trainer.code_counts_K, self.trainer.health_counts_K):
            sum_over_ranks(counts_K)
            if self.rank != 0:
                counts_K.zero_()

    def record(
        self, loaded: LoadedImages, loss_sum: float, digests: list[int], numbers: dict[str, float]
    ) -> dict[str, Any]:
        return run_log.step_record(loaded.step, loaded.batch, loss_sum / self.world_size, digests, **numbers)

    @property
    def saved_bytes(self) -> int:
        """Bytes that `save` writes, at most: weights, two moments of each, their average, and that as the result."""
        optimizers = [self.trainer.tokenizer_optimizer, self.trainer.discriminator_optimizer]
        groups = [group for optimizer in optimizers if optimizer is not None for group in optimizer.param_groups]
        return 5 * 4 * sum(p.numel() for group in groups for p in group["params"])

    def save(self, folder: str) -> None:
        """Rank 0 writes everything, for it is the same on every rank once code counts are pooled."""
        self._pool_counts()
        if self.rank != 0:
            return
        torch.save(self.trainer.state_dict(), os.path.join(folder, STATE))
        weights = self.trainer.averaged_tokenizer().state_dict()
        tensors = {name: t.cpu().contiguous() for name, t in weights.items()}
        save_file(tensors, os.path.join(folder, RESULT), own_metadata("training"))

    def load(self, commit: checkpoints.Commit) -> None:
        check_resumable(commit, self.options, self.inputs)
        with fetched(commit, lambda ranks: [STATE], self.device, self.keep_alive) as folder:
            state = torch.load(os.path.join(folder, STATE), map_location=self.device, weights_only=True)
        self.trainer.load_state_dict(state)
        if self.rank != 0:
            self.trainer.code_counts_K.zero_()
            self.trainer.health_counts_K.zero_()

    def settle(self) -> None:
        pass

    def measure(self) -> dict[str, float]:
        return {}


def worker_with(inputs: TrainingInputs) -> Callable[..., None]:
    """The worker of a job with these inputs."""
    return functools.partial(tokenizer_worker, inputs=inputs)
