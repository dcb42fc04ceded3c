"""What one worker of the first-stage job does: it trains the VQGAN on its shard of the images and commits as it goes."""

import io
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ray.train
import ray.train.torch
import torch
import torch.distributed as dist

from cluster import checkpoints
from pipeline import storage
from stages.errors import ConfigError
from stages.first_stage.discriminator import build_discriminator
from stages.first_stage.pixels import to_float
from stages.first_stage.quantizers.health import codebook_health
from stages.first_stage.tokenizer import Tokenizer, tokenizer_config
from stages.first_stage.training import FirstStageTrainer
from stages.memory import keep_freed_memory
from stages.options import (
    ImageOptions,
    RunOptions,
    ScalingOptions,
    SourceOptions,
    TokenizerOptions,
    TokenizerTrainOptions,
)

logger = logging.getLogger(__name__)

STATE = "state.pt"
SHUFFLE_ROWS = 16_384


@dataclass(frozen=True, kw_only=True)
class TokenizerJobOptions:
    """The sections that `train-tokenizer` takes."""

    run: RunOptions
    source: SourceOptions
    images: ImageOptions
    tokenizer: TokenizerOptions
    tokenizer_train: TokenizerTrainOptions
    scaling: ScalingOptions


def training_path(tokenizer_path: str) -> str:
    """Folder of a tokenizer's training history."""
    return storage.join(tokenizer_path, "training")


def tokenizer_worker(options: TokenizerJobOptions, num_threads: int) -> None:
    """Trains on this rank's shard of the images until the job has seen `num_samples`, committing as it goes."""
    keep_freed_memory()
    torch.set_num_threads(num_threads)
    train, run_path = options.tokenizer_train, training_path(options.tokenizer.path)
    trainer = _build_trainer(options)
    num_seen = _resume(trainer, run_path)
    log = _Log(trainer, options, run_path)
    shard = ray.train.get_dataset_shard("train")
    step = num_seen // train.global_batch_size
    while num_seen < train.num_samples:
        seen_before = num_seen
        for images in _batches(shard, options, seed=options.run.seed + step):
            metrics = trainer.step(images, num_seen)
            num_seen, step = num_seen + train.global_batch_size, step + 1
            is_last = num_seen >= train.num_samples
            log.record(step, num_seen, metrics, is_last)
            if step % train.checkpoint_every_steps == 0 or is_last:
                log.commit(step, num_seen)
            if is_last:
                break
        if num_seen == seen_before:
            raise ConfigError(
                f"tokenizer_train.global_batch_size is {train.global_batch_size}, but the source holds fewer images per worker than a "
                f"worker's share of it. Lower it."
            )


def _batches(shard: Any, options: TokenizerJobOptions, seed: int) -> Iterator[torch.Tensor]:
    """One epoch of float image batches (B, C, H, W) in [-1, 1], mirrored at random where the views allow it."""
    generator = torch.Generator().manual_seed(seed)
    local_batch = options.tokenizer_train.global_batch_size // options.scaling.max_workers
    device = ray.train.torch.get_device()
    batches = shard.iter_torch_batches(
        batch_size=local_batch,
        drop_last=True,
        prefetch_batches=2,
        local_shuffle_buffer_size=max(SHUFFLE_ROWS, 2 * local_batch),
        local_shuffle_seed=seed,
        device="cpu",
    )
    for batch in batches:
        images = to_float(batch["image"])
        if "flip" in options.images.views:
            is_flipped = torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5
            images = torch.where(is_flipped, images.flip(-1), images)
        yield images.to(device)


def _build_trainer(options: TokenizerJobOptions) -> FirstStageTrainer:
    torch.manual_seed(options.run.seed)
    device = ray.train.torch.get_device()
    tokenizer = Tokenizer(tokenizer_config(options.tokenizer, options.images)).to(device)
    discriminator = build_discriminator(options.tokenizer_train, options.images.channels, options.images.size)
    world_size = dist.get_world_size()

    def all_reduce_mean(tensor: torch.Tensor) -> None:
        if world_size > 1:
            dist.all_reduce(tensor)
            tensor /= world_size

    return FirstStageTrainer(
        tokenizer,
        None if discriminator is None else discriminator.to(device),
        options.tokenizer_train,
        wrap=ray.train.torch.prepare_model if world_size > 1 else lambda module: module,
        all_reduce_mean=all_reduce_mean,
    )


def _resume(trainer: FirstStageTrainer, run_path: str) -> int:
    """Loads the latest commit into the trainer; returns the images it has seen."""
    box = [checkpoints.latest_commit(run_path) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(box, src=0)
    commit = box[0]
    if commit is None:
        return 0
    data = storage.read_bytes(storage.join(commit.path, STATE))
    trainer.load_state_dict(torch.load(io.BytesIO(data), map_location=ray.train.torch.get_device(), weights_only=True))
    logger.info("Resuming from %s", commit.path)
    return commit.content["num_seen"]


class _Log:
    """Means of the metrics between two log lines, codebook health, commits."""

    def __init__(self, trainer: FirstStageTrainer, options: TokenizerJobOptions, run_path: str):
        self.trainer, self.options, self.run_path = trainer, options, run_path
        self.sums: dict[str, float] = {}
        self.num_steps = 0
        previous = checkpoints.latest_commit(run_path) if dist.get_rank() == 0 else None
        self.lines: list[dict[str, float]] = [] if previous is None else list(previous.content["log"])
        self.attempt = checkpoints.new_attempt()
        self.started, self.first_seen = time.monotonic(), 0 if previous is None else previous.content["num_seen"]

    def record(self, step: int, num_seen: int, metrics: dict[str, torch.Tensor], is_last: bool) -> None:
        """Adds one step; every `log_every_steps` writes a line and revives dead codes."""
        train = self.options.tokenizer_train
        for name, value in metrics.items():
            self.sums[name] = self.sums.get(name, 0.0) + value.item()
        self.num_steps += 1
        revives = (
            train.revive_every_steps and step % train.revive_every_steps == 0 and num_seen < 0.8 * train.num_samples
        )
        if step % train.log_every_steps == 0 or is_last:
            self._line(num_seen)
        if revives:
            self.trainer.revive_dead_codes()

    def _line(self, num_seen: int) -> None:
        counts = self.trainer.code_counts_K.clone()
        if dist.get_world_size() > 1:
            dist.all_reduce(counts)
        health = codebook_health(counts)
        means = {name: total / self.num_steps for name, total in self.sums.items()}
        seconds = time.monotonic() - self.started
        line = {
            "num_seen": num_seen,
            **means,
            "codebook_usage": health.usage,
            "codebook_perplexity": health.perplexity,
            "codebook_entropy": health.entropy,
            "seconds": seconds,
        }
        self.lines.append(line)
        self.sums, self.num_steps = {}, 0
        rate = (num_seen - self.first_seen) / seconds
        if dist.get_rank() == 0:
            logger.info(
                "images %d/%d  reconstruction %.4f  usage %.0f %%  perplexity %.0f  %.0f images/s  ETA %.0f s%s",
                num_seen,
                self.options.tokenizer_train.num_samples,
                means["reconstruction"],
                100 * health.usage,
                health.perplexity,
                rate,
                (self.options.tokenizer_train.num_samples - num_seen) / rate,
                f"  discriminator {means['discriminator']:.3f}" if "discriminator" in means else "",
            )

    def commit(self, step: int, num_seen: int) -> None:
        """Rank 0 saves the whole state (it is the same on every rank) and commits it."""
        if dist.get_rank() == 0:
            buffer = io.BytesIO()
            torch.save(self.trainer.state_dict(), buffer)
            path = checkpoints.checkpoint_path(self.run_path, step, self.attempt)
            storage.put_if_absent(storage.join(path, STATE), buffer.getvalue())
            last = self.lines[-1] if self.lines else {}
            content = {
                "step": step,
                "num_seen": num_seen,
                "reconstruction_loss": last.get("reconstruction", float("nan")),
                "codebook_usage": last.get("codebook_usage", 0.0),
                "codebook_perplexity": last.get("codebook_perplexity", 0.0),
                "log": self.lines,
                "files": [checkpoints.data_entry([buffer.getvalue()], STATE)],
            }
            checkpoints.write_commit(path, content)
            checkpoints.prune(self.run_path, checkpoints.Retention(newest=2))
        dist.barrier()
