"""The first-stage job: Ray Data streams and decodes images, Ray Train runs data-parallel workers that train the VQGAN on them."""

import io
import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data
import torch
import yaml

from cluster import checkpoints
from cluster.tokenizer_loop import STATE, TokenizerJobOptions, tokenizer_worker, training_path
from cluster.worker_group import check_workers_fit, run_workers
from pipeline import storage
from pipeline.sources import open_source
from pipeline.tokenizers import store_tokenizer, tokenizer_fingerprint
from pipeline.views import apply_view
from stages.config import to_dict, to_yaml
from stages.errors import ArtefactError, BadImage, ConfigError
from stages.first_stage.artefact import CONFIG
from stages.first_stage.discriminator import build_discriminator
from stages.first_stage.tokenizer import Tokenizer, tokenizer_config
from stages.options import ImageOptions, SourceOptions

logger = logging.getLogger(__name__)

# Decoded images up to this size are kept in the object store, so that later epochs read pixels instead of decoding again.
MATERIALIZE_BYTES = 1 << 29


@dataclass(frozen=True, kw_only=True)
class TokenizerSummary:
    """What `train-tokenizer` reports."""

    tokenizer: str
    fingerprint: str
    num_samples: int
    reconstruction_loss: float
    codebook_usage: float
    codebook_perplexity: float


def train_tokenizer(options: TokenizerJobOptions) -> TokenizerSummary:
    """Trains a tokenizer and writes its artefact; goes on from the last commit if there is one. Ray must be connected.

    Raises:
        ConfigError: options that cannot work, or a folder that holds a tokenizer trained with others.
        TesseraError: the store of the tokenizer lets two writers of one key both win.
    """
    config = tokenizer_config(options.tokenizer, options.images)
    build_discriminator(options.tokenizer_train, options.images.channels, options.images.size)
    check_batch(options)
    run_path = training_path(options.tokenizer.path)
    _check_same_options(run_path, options)
    if not storage.exists(storage.join(options.tokenizer.path, CONFIG)):
        latest = checkpoints.latest_commit(run_path)
        if latest is None or latest.content["num_seen"] < options.tokenizer_train.num_samples:
            check_workers_fit(options.scaling, needs_data_cpu=True)
            dataset = image_dataset(options.source, options.images)
            storage.check_conditional_put(run_path)
            storage.put_if_absent(storage.join(run_path, "config.yaml"), to_yaml(options).encode())
            logger.info(
                "Training a tokenizer with %d levels on %s", len(config.channel_multipliers), options.source.name
            )
            run_workers(
                tokenizer_worker, options, options.scaling, storage.join(run_path, "ray"), datasets={"train": dataset}
            )
            latest = checkpoints.latest_commit(run_path)
        assert latest is not None
        store_tokenizer(_averaged(latest, options), options.tokenizer.path)
    commits = checkpoints.list_commits(run_path)
    if not commits:
        raise ConfigError(
            f"tokenizer.path is {options.tokenizer.path}, but the tokenizer there was not trained by this command. Use it as it "
            f"is, or another tokenizer.path to train one."
        )
    content = commits[-1].content
    return TokenizerSummary(
        tokenizer=options.tokenizer.path,
        fingerprint=tokenizer_fingerprint(options.tokenizer.path),
        num_samples=content["num_seen"],
        **{name: content[name] for name in ("reconstruction_loss", "codebook_usage", "codebook_perplexity")},
    )


def check_batch(options: TokenizerJobOptions) -> None:
    """Refuses a number of workers that changes, and a global batch that the workers do not divide."""
    size, scaling = options.tokenizer_train.global_batch_size, options.scaling
    workers = scaling.max_workers
    if scaling.min_workers != workers:
        raise ConfigError(
            f"scaling.num_workers is [{scaling.min_workers}, {workers}], but train-tokenizer runs with a fixed number. Give one."
        )
    if size % workers:
        raise ConfigError(
            f"tokenizer_train.global_batch_size is {size}, but it must be a multiple of scaling.num_workers = {workers}. "
            f"Use {-(-size // workers) * workers}."
        )


def _check_same_options(run_path: str, options: TokenizerJobOptions) -> None:
    """One folder, one training: refuses options other than those a training in this folder was started with."""
    path = storage.join(run_path, "config.yaml")
    if not storage.exists(path):
        return
    saved = yaml.safe_load(storage.read_bytes(path))
    for section, values in to_dict(options).items():
        for key, value in values.items():
            before = saved.get(section, {}).get(key)
            if section != "scaling" and before != value:
                raise ConfigError(
                    f"{section}.{key} is {value}, but the tokenizer in {options.tokenizer.path} is trained with {before}. "
                    f"Use the same value, or another tokenizer.path."
                )


def image_dataset(source_options: SourceOptions, image_options: ImageOptions) -> ray.data.Dataset:
    """Training images as uint8 pixels (size, size, channels), read and decoded by Ray Data tasks in random order."""
    source = open_source(source_options, image_options)
    listing = source.list_images("train")
    order = np.random.default_rng(source_options.seed).permutation(len(listing))
    table = listing.select(["uri"]).take(pa.array(order))
    ray.data.DataContext.get_current().enable_progress_bars = False  # the workers' own lines say how far they are
    dataset = ray.data.from_arrow(table).repartition(max(1, min(256, len(table) // 256)))
    dataset = dataset.map_batches(
        _read_images,  # type: ignore[arg-type]  # Ray's annotations know no Arrow tables
        fn_kwargs={"source": source, "images": image_options},
        batch_size=128,
        batch_format="pyarrow",
    )
    num_bytes = len(table) * image_options.size**2 * image_options.channels
    return dataset.materialize() if num_bytes <= MATERIALIZE_BYTES else dataset


def _read_images(table: pa.Table, source: Any, images: ImageOptions) -> dict[str, np.ndarray]:
    """Pixels of a batch of uris. Unusable images are left out and named in the log: training needs none in particular."""
    pixels = []
    for uri in table["uri"].to_pylist():
        try:
            pixels.append(apply_view(source.decode(source.fetch(uri)).image, "center", images))
        except BadImage as error:
            logger.warning("Image %s is left out of tokenizer training: %s (%s)", uri, error.kind, error.message)
    shape = (0, images.size, images.size, images.channels)
    return {"image": np.stack(pixels) if pixels else np.zeros(shape, np.uint8)}


def _averaged(commit: checkpoints.Commit, options: TokenizerJobOptions) -> Tokenizer:
    """The tokenizer with the averaged weights of a commit."""
    state = torch.load(
        io.BytesIO(storage.read_bytes(storage.join(commit.path, STATE))), map_location="cpu", weights_only=True
    )
    if commit.content["num_seen"] < options.tokenizer_train.num_samples:
        raise ArtefactError(
            f"{commit.path} ends at image {commit.content['num_seen']}, but the training is longer. Run it again."
        )
    tokenizer = Tokenizer(tokenizer_config(options.tokenizer, options.images))
    tokenizer.load_state_dict(
        state["average"] if options.tokenizer_train.weight_average_decay > 0 else state["tokenizer"]
    )
    return tokenizer
