"""The first-stage job: checks on the driver, then workers on Ray Train that train the VQGAN on images which Ray Data streams."""

import logging
import os
from dataclasses import dataclass

import ray
from safetensors.torch import load_file

from cluster import checkpoints, run_log
from cluster.tokenizer_history import TrainingInputs, check_resumable, image_reader, list_training_images
from cluster.tokenizer_loop import RESULT, worker_with
from cluster.tokenizer_options import TokenizerJobOptions, check_training, num_steps, settle, training_path
from cluster.worker_group import check_workers_fit, run_to_the_end
from pipeline import storage
from pipeline.image_order import list_hash
from pipeline.inputs import check_maps
from pipeline.perceptual import load_lpips
from pipeline.tokenizers import store_tokenizer, tokenizer_fingerprint
from stages.config import to_yaml
from stages.errors import ConfigError
from stages.first_stage.artefact import CONFIG
from stages.first_stage.tokenizer import Tokenizer
from stages.first_stage.tokenizer_config import tokenizer_config

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TokenizerSummary:
    """What `train-tokenizer` reports; the numbers are those of the last step."""

    tokenizer: str
    fingerprint: str
    num_samples: int
    reconstruction_loss: float
    codebook_usage: float | None
    codebook_perplexity: float | None
    sample_log_hash: str


def train_tokenizer(options: TokenizerJobOptions) -> TokenizerSummary:
    """Trains a tokenizer and writes its artefact; goes on from the last commit if there is one. Ray must be connected.

    Raises:
        ConfigError: options that cannot work, or a folder with a tokenizer that was not trained.
        ArtefactError: the training in the folder is of other options, images or perceptual weights.
        TesseraError: the store of the tokenizer lets two writers of one key both win.
    """
    check_training(options)
    run_path, total = training_path(options.tokenizer.path), num_steps(options.tokenizer_train)
    is_stored = storage.exists(storage.join(options.tokenizer.path, CONFIG))
    newest = checkpoints.newest_commit(run_path) if is_stored else checkpoints.latest_commit(run_path, (RESULT,))
    if is_stored and newest is None:
        raise ConfigError(
            f"tokenizer.path is {options.tokenizer.path}, but the tokenizer there was not trained by this command. Use it as it "
            f"is, or another tokenizer.path to train one."
        )
    options = settle(options, None if newest is None else newest.content["fixed_options"])
    inputs = _inputs(options)
    if newest is not None:
        check_resumable(newest, options, inputs)
        if is_stored and newest.step < total:
            raise ConfigError(
                f"tokenizer_train.num_samples is {options.tokenizer_train.num_samples}, but the tokenizer in {options.tokenizer.path} "
                f"is finished and artefacts never change. Use another tokenizer.path, or copy its training folder there to go on."
            )
    if newest is None or newest.step < total:
        newest = _train(options, inputs, run_path, total)
    if not is_stored:
        store_tokenizer(_result(newest, options), options.tokenizer.path)
    return _summary(options, newest)


def _inputs(options: TokenizerJobOptions) -> TrainingInputs:
    """Lists the images and loads the perceptual network, once for all workers."""
    images, lpips = list_training_images(options, compare_splits=True), load_lpips(options.tokenizer_train)
    network, hashes = (None, {}) if lpips is None else lpips
    return TrainingInputs(
        list_hash=list_hash(images),
        num_images=len(images),
        table=ray.put(images.select(["uri"])),
        perceptual=None if network is None else ray.put(network),
        perceptual_hashes=hashes,
    )


def _train(options: TokenizerJobOptions, inputs: TrainingInputs, run_path: str, total: int) -> checkpoints.Commit:
    check_workers_fit(options.scaling, needs_data_cpu=True)
    # Some images here, so that options that do not fit the source are an error before any worker starts.
    reader, table = image_reader(options, inputs), ray.get(inputs.table)
    check_maps(reader.source, table["uri"], options.tokenizer)
    reader.read_step(0, slice(0, 1), (), table)
    storage.check_conditional_put(run_path)
    storage.replace(storage.join(run_path, "config.yaml"), to_yaml(options).encode())
    logger.info("Training a tokenizer on %d images of %s", inputs.num_images, options.source.name)
    return run_to_the_end(worker_with(inputs), options, options.scaling, run_path, total)


def _result(commit: checkpoints.Commit, options: TokenizerJobOptions) -> Tokenizer:
    tokenizer = Tokenizer(tokenizer_config(options.tokenizer, options.images))
    with checkpoints.local_folder(commit, [RESULT]) as folder:
        tokenizer.load_state_dict(load_file(os.path.join(folder, RESULT)))
    return tokenizer


def _summary(options: TokenizerJobOptions, commit: checkpoints.Commit) -> TokenizerSummary:
    (last,) = run_log.read_tail(training_path(options.tokenizer.path), commit.content["log"], 1)[-1:]
    return TokenizerSummary(
        tokenizer=options.tokenizer.path,
        fingerprint=tokenizer_fingerprint(options.tokenizer.path),
        num_samples=commit.step * options.tokenizer_train.global_batch_size,
        reconstruction_loss=last["loss"],
        codebook_usage=last.get("codebook_usage"),
        codebook_perplexity=last.get("codebook_perplexity"),
        sample_log_hash=commit.content["sample_log_hash"],
    )
