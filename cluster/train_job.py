"""The second-stage job on Ray Train: checks on the driver, then a worker group that restarts from the last commit."""

import logging
import math
from dataclasses import dataclass

import ray.train
from ray.train.torch import TorchConfig, TorchTrainer

from cluster import checkpoints
from cluster.runtime import user_errors
from cluster.train_loop import TrainJobOptions, check_resumable, dataset_transformer_config, train_worker
from pipeline import storage
from pipeline.code_dataset import CodeDataset
from pipeline.tokenizers import tokenizer_fingerprint
from stages.config import to_yaml
from stages.errors import ArtefactError, ConfigError
from stages.options import ScalingOptions, TrainOptions

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TrainSummary:
    """What `train` reports: the run, its last step, that commit and what it holds."""

    run: str
    step: int
    checkpoint: str
    train_loss: float
    sample_log_hash: str


def train(options: TrainJobOptions) -> TrainSummary:
    """Trains the transformer to `train.num_steps`, from the run's last commit if it has one. Ray must be connected.

    Raises:
        ConfigError: a batch that does not divide, or workers that the cluster cannot hold.
        ArtefactError: the code dataset is missing or damaged, or the run belongs to other artefacts.
    """
    check_batch(options.train, options.scaling.num_workers)
    dataset = CodeDataset.open(options.codes.path, verify=options.codes.verify_on_open)
    check_tokenizer(options.tokenizer.path, dataset)
    config = dataset_transformer_config(options, dataset)
    storage.replace(storage.join(options.run.path, "config.yaml"), to_yaml(options).encode())
    latest = checkpoints.latest_commit(options.run.path)
    if latest is not None:
        check_resumable(latest, options, dataset, config, options.scaling.num_workers)
        if latest.step >= options.train.num_steps:
            logger.info("%s has step %d already", options.run.path, latest.step)
            return _summary(options.run.path, latest)
    run_workers(train_worker, options, options.scaling, storage.join(options.run.path, "ray"))
    latest = checkpoints.latest_commit(options.run.path)
    assert latest is not None and latest.step >= options.train.num_steps
    return _summary(options.run.path, latest)


def run_workers(worker, options, scaling: ScalingOptions, storage_path: str, datasets=None, dataset_config=None) -> None:
    """Runs `worker(options, num_threads)` on every rank of a Ray Train worker group.

    Ray's own state goes to a folder of its own, new for every call: what survives a crash is our commits, not Ray's snapshots.
    """
    check_workers_fit(scaling, needs_data_cpu=datasets is not None)
    num_threads = scaling.threads_per_worker or math.ceil(scaling.cpus_per_worker)
    trainer = TorchTrainer(
        lambda: worker(options, num_threads),
        torch_config=TorchConfig(),
        scaling_config=ray.train.ScalingConfig(
            num_workers=scaling.num_workers,
            use_gpu=scaling.use_gpu,
            resources_per_worker={"CPU": scaling.cpus_per_worker, **({"GPU": 1} if scaling.use_gpu else {})},
        ),
        run_config=ray.train.RunConfig(
            name=f"attempt-{checkpoints.new_attempt()}",
            storage_path=storage_path,
            failure_config=ray.train.FailureConfig(max_failures=scaling.max_failures),
        ),
        datasets=datasets,
        dataset_config=dataset_config,
    )
    with user_errors():
        trainer.fit()
    storage.delete_tree(storage_path)


def check_batch(train: TrainOptions, num_workers: int) -> None:
    """Refuses a global batch that micro batches and workers do not divide."""
    unit = train.micro_batch_size * num_workers
    if train.global_batch_size % unit:
        nearest = math.ceil(train.global_batch_size / unit) * unit
        raise ConfigError(
            f"train.global_batch_size is {train.global_batch_size}, but it must be a multiple of scaling.num_workers * "
            f"train.micro_batch_size = {num_workers} * {train.micro_batch_size} = {unit}. Use {nearest}, or change "
            f"train.micro_batch_size."
        )


def check_workers_fit(scaling: ScalingOptions, needs_data_cpu: bool) -> None:
    """Refuses a worker group the cluster can never start, which Ray would wait for without end."""
    resources = ray.cluster_resources()
    cpus, wanted = resources.get("CPU", 0.0), scaling.num_workers * scaling.cpus_per_worker
    if wanted > cpus or (needs_data_cpu and wanted > cpus - 1):
        spare = ", of which one must stay free for reading images" if needs_data_cpu else ""
        raise ConfigError(
            f"scaling.num_workers * scaling.cpus_per_worker is {wanted:g}, but the cluster has {cpus:g} CPUs{spare}. Lower one of them."
        )
    gpus = resources.get("GPU", 0.0)
    if scaling.use_gpu and scaling.num_workers > gpus:
        raise ConfigError(f"scaling.num_workers is {scaling.num_workers}, but the cluster has {gpus:g} GPUs. Lower it or use_gpu=false.")


def check_tokenizer(path: str, dataset: CodeDataset) -> None:
    """Refuses a tokenizer other than the one that wrote the codes."""
    found = tokenizer_fingerprint(path)
    if found != dataset.tokenizer_fingerprint:
        raise ArtefactError(
            f"tokenizer.path is {path} with fingerprint {found}, but the code dataset {dataset.path} was written by tokenizer "
            f"{dataset.tokenizer_fingerprint}. Name that tokenizer, or another codes.path."
        )


def _summary(run_path: str, commit: checkpoints.Commit) -> TrainSummary:
    return TrainSummary(
        run=run_path,
        step=commit.step,
        checkpoint=commit.path,
        train_loss=commit.train_loss,
        sample_log_hash=commit.content["sample_log_hash"],
    )
