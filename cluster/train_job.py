"""The second-stage job on Ray Train: checks on the driver, then a worker group that restarts from the last commit."""

import logging
import math
from dataclasses import dataclass

from cluster import checkpoints
from cluster.train_loop import TrainJobOptions, check_resumable, dataset_transformer_config, train_worker
from cluster.worker_group import check_workers_fit, run_workers
from pipeline import storage
from pipeline.binding import check_dataset
from pipeline.loader import open_dataset
from stages.config import to_yaml
from stages.errors import ConfigError
from stages.options import TrainOptions

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
        ConfigError: a batch that does not divide, workers that the cluster cannot hold, or other image options than the codes'.
        ArtefactError: the code dataset is missing or damaged, the tokenizer is not the one that made it, or the run belongs to
            other artefacts.
        TesseraError: the store of the run lets two writers of one key both win.
    """
    check_batch(options.train, options.scaling.num_workers)
    dataset = open_dataset(options.codes, verify=options.codes.verify_on_open)
    check_dataset(dataset, options.tokenizer.path, options.images)
    config = dataset_transformer_config(options, dataset)
    latest = checkpoints.latest_commit(options.run.path)
    if latest is not None:
        check_resumable(latest, options, dataset, config, options.scaling.num_workers)
        if latest.step >= options.train.num_steps:
            logger.info("%s has step %d already", options.run.path, latest.step)
            return _summary(options.run.path, latest)
    check_workers_fit(options.scaling, needs_data_cpu=False)
    storage.check_conditional_put(options.run.path)
    storage.replace(storage.join(options.run.path, "config.yaml"), to_yaml(options).encode())
    run_workers(train_worker, options, options.scaling, storage.join(options.run.path, "ray"))
    latest = checkpoints.latest_commit(options.run.path)
    assert latest is not None and latest.step >= options.train.num_steps
    return _summary(options.run.path, latest)


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


def _summary(run_path: str, commit: checkpoints.Commit) -> TrainSummary:
    return TrainSummary(
        run=run_path,
        step=commit.step,
        checkpoint=commit.path,
        train_loss=commit.train_loss,
        sample_log_hash=commit.content["sample_log_hash"],
    )
