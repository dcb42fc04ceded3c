"""What one worker of the second-stage job does: the training loop, its commits and its resume.

The row order, dropout, learning rate and condition dropping of a step are functions of the step, so the state of a run is its
weights, its optimizer and one integer.
"""

import dataclasses
import hashlib
import logging
import math
import os
import shutil
import tempfile
import time
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from cluster import checkpoints, run_log
from cluster.deepspeed_engine import build_engine, gather_weights, set_learning_rate
from pipeline import storage
from pipeline.binding import encoding_of
from pipeline.code_dataset import CodeDataset
from pipeline.loader import CodeLoader, LoadedStep, dataset_order, open_dataset
from pipeline.order import SAMPLER_VERSION
from stages.config import to_dict
from stages.errors import ArtefactError, TesseraError
from stages.memory import keep_freed_memory
from stages.options import (
    CodesOptions,
    ConditioningOptions,
    DeepSpeedOptions,
    ImageOptions,
    ModelOptions,
    OptimOptions,
    RunOptions,
    ScalingOptions,
    TokenizerOptions,
    TrainOptions,
)
from stages.second_stage.transformer import TransformerConfig, nll, transformer_config

logger = logging.getLogger(__name__)

WEIGHTS = "transformer.safetensors"
OPTIMIZER_TAG = "deepspeed"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainJobOptions:
    """The sections that `train` takes."""

    run: RunOptions
    images: ImageOptions
    tokenizer: TokenizerOptions
    codes: CodesOptions
    model: ModelOptions
    conditioning: ConditioningOptions
    optim: OptimOptions
    train: TrainOptions
    deepspeed: DeepSpeedOptions
    scaling: ScalingOptions


def dataset_transformer_config(options: TrainJobOptions, dataset: CodeDataset) -> TransformerConfig:
    """The transformer for a code dataset."""
    return transformer_config(
        options.model,
        options.conditioning,
        codebook_size=dataset.codebook_size,
        grid=dataset.grid,
        num_classes=len(dataset.class_names),
    )


def train_worker(options: TrainJobOptions, num_threads: int) -> None:
    """Trains from the run's latest commit, or from the start, to `train.num_steps`. Runs on every rank of a process group."""
    keep_freed_memory()
    torch.set_num_threads(num_threads)
    torch.use_deterministic_algorithms(options.train.deterministic)
    worker = _Worker(options)
    worker.resume()
    worker.run()


class _Worker:
    """One rank's engine, loader and log since the last commit."""

    def __init__(self, options: TrainJobOptions):
        self.options = options
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.dataset = open_dataset(options.codes, verify=False)
        self.config = dataset_transformer_config(options, self.dataset)
        order = dataset_order(
            self.dataset,
            seed=options.run.seed,
            global_batch_size=options.train.global_batch_size,
            window_groups=options.train.shuffle_window,
        )
        self.loader = CodeLoader(
            self.dataset,
            order,
            rank=self.rank,
            world_size=self.world_size,
            micro_batch_size=options.train.micro_batch_size,
            cond_drop_prob=options.conditioning.cond_drop_prob,
        )
        self.engine = build_engine(
            self.config, options.run.seed, options.train, options.optim, options.deepspeed, self.world_size
        )
        self.attempt = _broadcast(checkpoints.new_attempt())
        self.step = 0
        self.parent: checkpoints.Commit | None = None
        self.records: list[dict[str, Any]] = []

    def resume(self) -> None:
        """Loads the latest commit of the run, if there is one."""
        path = _broadcast(_latest_path(self.options.run.path) if self.rank == 0 else None)
        if path is None:
            return
        commit = checkpoints.open_commit(path)
        check_resumable(commit, self.options, self.dataset, self.config, self.world_size)
        with checkpoints.local_folder(commit) as folder:
            loaded, _ = self.engine.load_checkpoint(folder, tag=OPTIMIZER_TAG)
        if loaded is None:
            raise ArtefactError(
                f"{commit.path} holds no optimizer state that DeepSpeed can load. Use another checkpoint."
            )
        self.step, self.parent = commit.step, commit
        logger.info("Resuming from %s", commit.path)

    def run(self) -> None:
        """Steps and commits until the run has `train.num_steps`."""
        train = self.options.train
        started, first_step = time.monotonic(), self.step
        self.engine.train()
        for loaded in self.loader.iterate(self.step, train.num_steps):
            self.records.append(self._train_step(loaded))
            self.step = loaded.step + 1
            if self.rank == 0 and (self.step % train.log_every_steps == 0 or self.step == train.num_steps):
                self._log_progress(time.monotonic() - started, self.step - first_step)
            if self.step % train.checkpoint_every_steps == 0 or self.step == train.num_steps:
                self._commit()

    def _train_step(self, loaded: LoadedStep) -> dict[str, Any]:
        options, engine, step = self.options, self.engine, loaded.step
        learning_rate = set_learning_rate(engine, options.optim, step, options.train.num_steps)
        torch.manual_seed(_step_seed(options.run.seed, step, self.rank))
        # DeepSpeed averages over ranks and micro batches; undoing that makes the gradient the mean over valid codes.
        num_codes = loaded.num_valid * self.dataset.num_codes
        scale = len(loaded.micro_batches) * self.world_size / num_codes
        total = torch.zeros((), dtype=torch.float64)
        for batch in loaded.micro_batches:
            codes, labels, valid = (tensor.to(engine.device) for tensor in (batch.codes, batch.labels, batch.valid))
            loss = (nll(engine(codes, labels), codes) * valid).sum()
            engine.backward(loss * scale)
            engine.step()
            total += loss.detach().double().cpu()
        # One collective carries the loss and, in two halves that float64 holds exactly, every rank's digest.
        values = [total.item(), float(loaded.digest >> 32), float(loaded.digest & 0xFFFFFFFF)]
        message = torch.tensor(values, dtype=torch.float64, device=engine.device)
        gathered = [torch.empty_like(message) for _ in range(self.world_size)]
        dist.all_gather(gathered, message)
        loss_value = sum(g[0].item() for g in gathered) / num_codes
        if not math.isfinite(loss_value):
            raise TesseraError(
                f"The loss of step {step} is {loss_value}, but it must be finite. Lower optim.learning_rate, or use train.precision=fp32; "
                f"the run's last commit is untouched."
            )
        digests = [(int(g[1].item()) << 32) | int(g[2].item()) for g in gathered]
        grad_norm = engine.get_global_grad_norm()
        return run_log.step_record(
            step,
            loss_value,
            digests,
            learning_rate=learning_rate,
            grad_norm=float(grad_norm) if grad_norm is not None else 0.0,
        )

    def _log_progress(self, seconds: float, num_steps: int) -> None:
        train, record = self.options.train, self.records[-1]
        rate = num_steps / seconds
        logger.info(
            "step %d/%d  loss %.4f nats/code  lr %.2e  %.0f codes/s  ETA %.0f s",
            self.step,
            train.num_steps,
            record["loss"],
            record["learning_rate"],
            rate * train.global_batch_size * self.dataset.num_codes,
            (train.num_steps - self.step) / rate,
        )

    def _commit(self) -> None:
        """Every rank saves its part, all meet, rank 0 commits. Not before all rows that were trained on are checked."""
        self.loader.settle()
        run_path = self.options.run.path
        path = checkpoints.checkpoint_path(run_path, self.step, self.attempt)
        is_local = storage.is_local(path)
        folder = path if is_local else tempfile.mkdtemp(prefix="tessera-save-")
        os.makedirs(folder, exist_ok=True)
        self.engine.save_checkpoint(folder, tag=OPTIMIZER_TAG, save_latest=False)
        weights = gather_weights(self.engine, self.rank, self.options.deepspeed.zero_stage)
        if self.rank == 0:
            save_file(weights, os.path.join(folder, WEIGHTS))
        dist.barrier()
        entries = self._publish_files(folder, path, is_local)
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, entries)
        if not is_local:
            shutil.rmtree(folder)
        parent = None
        if self.rank == 0:
            content = self._commit_content([entry for part in gathered for entry in part])
            parent = checkpoints.write_commit(path, content).path
            checkpoints.prune(run_path, self.options.train.keep_checkpoints)
        self.parent = checkpoints.open_commit(_broadcast(parent))
        self.records = []

    def _publish_files(self, folder: str, path: str, is_local: bool) -> list[dict[str, Any]]:
        """Syncs (local) or uploads (remote) this rank's share of the files and returns their entries."""
        names = sorted(
            os.path.relpath(os.path.join(root, name), folder) for root, _, files in os.walk(folder) for name in files
        )
        if is_local:
            names = names[self.rank :: self.world_size]  # the folder is shared, so ranks split the hashing
        for name in names:
            if is_local:
                checkpoints.sync_file(os.path.join(folder, name))
            else:
                storage.put_file_if_absent(storage.join(path, name), os.path.join(folder, name))
        return [checkpoints.file_entry(os.path.join(folder, name), name) for name in names]

    def _commit_content(self, files: list[dict[str, Any]]) -> dict[str, Any]:
        options, parent = self.options, self.parent
        previous = run_log.EMPTY_HASH if parent is None else parent.content["sample_log_hash"]
        segment = run_log.write_segment(options.run.path, f"step-{self.step:09d}-{self.attempt}", self.records)
        return {
            "step": self.step,
            "attempt": self.attempt,
            "parent": None if parent is None else os.path.basename(parent.path),
            "train_loss": self.records[-1]["loss"],
            "codes_path": options.codes.path,
            "root_hash": self.dataset.root_hash,
            "tokenizer_fingerprint": self.dataset.tokenizer_fingerprint,
            "encoding": encoding_of(self.dataset.manifest),
            "world_size": self.world_size,
            "zero_stage": options.deepspeed.zero_stage,
            "precision": options.train.precision,
            "sampler": {
                "version": SAMPLER_VERSION,
                "seed": options.run.seed,
                "global_batch_size": options.train.global_batch_size,
                "step": self.step,
                "window": options.train.shuffle_window,
            },
            "transformer": to_dict(self.config),
            "options": to_dict(options),
            "log": ([] if parent is None else parent.content["log"]) + [segment],
            "sample_log_hash": run_log.chain(previous, self.records),
            "files": files,
        }


def check_resumable(
    commit: checkpoints.Commit,
    options: TrainJobOptions,
    dataset: CodeDataset,
    config: TransformerConfig,
    world_size: int,
) -> None:
    """Refuses a commit that this job cannot continue exactly.

    Raises:
        ArtefactError: another code dataset, model, order, ZeRO stage, precision or world size; both sides are named.
    """
    content, ours = commit.content, to_dict(config)
    pairs = [
        ("codes.path", "code dataset", content["root_hash"], dataset.root_hash),
        ("run.seed", "seed", content["sampler"]["seed"], options.run.seed),
        (
            "train.global_batch_size",
            "global batch size",
            content["sampler"]["global_batch_size"],
            options.train.global_batch_size,
        ),
        ("Tessera", "sampler version", content["sampler"].get("version"), SAMPLER_VERSION),
        ("train.shuffle_window", "window", content["sampler"]["window"], options.train.shuffle_window),
        ("deepspeed.zero_stage", "ZeRO stage", content["zero_stage"], options.deepspeed.zero_stage),
        ("train.precision", "precision", content["precision"], options.train.precision),
        ("scaling.num_workers", "world size", content["world_size"], world_size),
    ]
    pairs += [("model", f"transformer {name}", value, ours.get(name)) for name, value in content["transformer"].items()]
    for key, what, saved, asked in pairs:
        if saved != asked:
            raise ArtefactError(
                f"{key} gives {what} {asked}, but the run at {options.run.path} was trained to step {commit.step} with {saved}. "
                f"Use the same value, or another run.path."
            )


def _latest_path(run_path: str) -> str | None:
    commit = checkpoints.latest_commit(run_path)
    return None if commit is None else commit.path


def _broadcast(value: Any) -> Any:
    """Rank 0's value on every rank."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def _step_seed(seed: int, step: int, rank: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{step}:{rank}".encode()).digest()[:8], "little") >> 1
