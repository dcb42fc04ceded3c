"""The second-stage job on Ray Train: checks on the driver, then a worker group that restarts from the last commit."""

import logging
import math
from dataclasses import dataclass

from cluster import checkpoints
from cluster.resume import check_resumable
from cluster.train_loop import train_worker
from cluster.train_options import TrainJobOptions, dataset_transformer_config, training_conditions
from cluster.worker_group import check_workers_fit, run_to_the_end
from pipeline import storage
from pipeline.binding import check_dataset
from pipeline.loader import open_dataset
from stages.config import to_yaml
from stages.errors import ConfigError
from stages.options import ScalingOptions, TrainOptions

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TrainSummary:
    """What `train` reports: the run, its last step, that commit and what it holds."""

    run: str
    step: int
    checkpoint: str
    train_loss: float | None
    sample_log_hash: str


def train(options: TrainJobOptions) -> TrainSummary:
    """Trains the transformer to `train.num_steps`, from the run's last commit if it has one. Ray must be connected.

    Raises:
        ConfigError: a batch that does not divide, workers that the cluster cannot hold, or other image options than the codes'.
        ArtefactError: a code dataset is missing or damaged, the tokenizer is not the one that made it, or the run belongs to
            other artefacts.
        TesseraError: the store of the run lets two writers of one key both win.
    """
    check_batch(options.train, options.scaling)
    dataset = open_dataset(options.codes, verify=options.codes.verify_on_open)
    check_dataset(dataset, options.tokenizer, options.images)
    conditions = training_conditions(options, dataset, verify=options.codes.verify_on_open)
    config = dataset_transformer_config(options, dataset, conditions)
    newest = checkpoints.newest_commit(options.run.path)
    if newest is not None:
        check_resumable(newest, options, dataset, conditions, config)
        done = checkpoints.latest_commit(options.run.path) if newest.step >= options.train.num_steps else None
        if done is not None and done.step >= options.train.num_steps:
            logger.info("%s has step %d already", options.run.path, done.step)
            return _summary(options.run.path, done)
    check_workers_fit(options.scaling, needs_data_cpu=False)
    storage.check_conditional_put(options.run.path)
    storage.replace(storage.join(options.run.path, "config.yaml"), to_yaml(options).encode())
    newest = run_to_the_end(train_worker, options, options.scaling, options.run.path, options.train.num_steps)
    return _summary(options.run.path, newest)


def check_batch(train: TrainOptions, scaling: ScalingOptions) -> None:
    """Refuses a global batch that the workers cannot hold, or that a fixed number of them does not divide.

    Where the number of workers changes while a job runs, slices are padded with rows that do not count.
    """
    if train.global_batch_size < scaling.max_workers:
        raise ConfigError(
            f"train.global_batch_size is {train.global_batch_size}, but each of {scaling.max_workers} workers needs a row. Lower "
            f"scaling.num_workers to at most {train.global_batch_size}."
        )
    unit = train.micro_batch_size * scaling.max_workers
    if scaling.min_workers == scaling.max_workers and train.global_batch_size % unit:
        nearest = math.ceil(train.global_batch_size / unit) * unit
        raise ConfigError(
            f"train.global_batch_size is {train.global_batch_size}, but it must be a multiple of scaling.num_workers * "
            f"train.micro_batch_size = {scaling.max_workers} * {train.micro_batch_size} = {unit}. Use {nearest}, or change "
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
