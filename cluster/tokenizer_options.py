"""The options of the `train-tokenizer` job, what follows from them, and which of them a training may change midway."""

import dataclasses
import logging
from collections.abc import Callable, Mapping
from typing import Any

from pipeline import storage
from pipeline.code_dataset.codec import num_bits
from stages.config import to_dict
from stages.errors import ConfigError
from stages.first_stage.discriminator import build_discriminator
from stages.first_stage.lpips import SMALLEST_IMAGE
from stages.first_stage.quantizers.loss_weights import check_losses
from stages.first_stage.quantizers.revival import revive_share
from stages.first_stage.tokenizer_config import PUBLISHED_NORM_GROUPS, num_norm_groups, tokenizer_config
from stages.options import (
    ImageOptions,
    RunOptions,
    ScalingOptions,
    SourceOptions,
    TokenizerOptions,
    TokenizerTrainOptions,
)

logger = logging.getLogger(__name__)

# What may differ when a training goes on: none of it changes what a step computes, but for the order of sums among ranks.
FREE = {
    "tokenizer_train": {
        "checkpoint_every_steps",
        "keep_checkpoints",
        "log_every_steps",
        "max_rollbacks",
        "perceptual_heads",
        "perceptual_vgg",
        "skip_batches",
        "spike_threshold",
    },
    "run": {"path"},
    "source": {
        "holdout_fraction",
        "holdout_maps",
        "holdout_path",
        "label_maps",
        "num_holdout_images",
        "number_maps",
        "path",
        "split",
    },
    "images": {"views"},
    "tokenizer": {"path"},
}
# What a training has that began before there was an option for it.
BEFORE_THE_OPTION: dict[str, int | float] = {"tokenizer.num_norm_groups": PUBLISHED_NORM_GROUPS, "tokenizer_train.revive_share": 0.8}


@dataclasses.dataclass(frozen=True, kw_only=True)
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


def num_steps(train: TokenizerTrainOptions) -> int:
    """Optimizer steps after which `num_samples` images were seen."""
    return -(-train.num_samples // train.global_batch_size)


def check_training(options: TokenizerJobOptions) -> None:
    """Refuses options that cannot work together.

    Raises:
        ConfigError: naming the keys, the values and the rule.
    """
    train = options.tokenizer_train
    check_networks(options.tokenizer, train, options.images)
    if train.perceptual_weight > 0 and train.perceptual_vgg is None:
        raise ConfigError(
            f"tokenizer_train.perceptual_weight is {train.perceptual_weight}, but tokenizer_train.perceptual_vgg names no weights. "
            f"Name a file of VGG16 weights, or set the weight to 0."
        )
    check_batch(options)
    _warn_of_missing_attention(options)
    _warn_of_missing_discriminator(train)


def _warn_of_missing_attention(options: TokenizerJobOptions) -> None:
    sides = [options.images.size >> level for level in range(len(options.tokenizer.channel_multipliers))]
    if missing := [side for side in options.tokenizer.attention_resolutions if side not in sides]:
        logger.warning(
            "tokenizer.attention_resolutions has %s, but feature maps of %d pixel images have the sides %s: there is no attention at %s.",
            list(options.tokenizer.attention_resolutions),
            options.images.size,
            ", ".join(map(str, sides)),
            ", ".join(map(str, missing)),
        )


def _warn_of_missing_discriminator(train: TokenizerTrainOptions) -> None:
    for key in ("lecam_weight", "r1_weight"):
        if getattr(train, key) > 0 and train.discriminator_weight == 0:
            logger.warning(
                "tokenizer_train.%s is %s, but there is no discriminator (discriminator_weight=0) to hold back.", key, getattr(train, key)
            )


def check_networks(tokenizer: TokenizerOptions, train: TokenizerTrainOptions, images: ImageOptions) -> None:
    """Refuses a tokenizer, losses and discriminator that do not fit each other, the images or code datasets.

    Raises:
        ConfigError: naming the keys, the values and the rule.
    """
    config = tokenizer_config(tokenizer, images)
    check_losses(tokenizer.quantizer, train)
    build_discriminator(train, config.in_channels, images.size)
    if train.perceptual_weight > 0 and images.size < SMALLEST_IMAGE:
        raise ConfigError(
            f"tokenizer_train.perceptual_weight is {train.perceptual_weight}, but VGG16 halves images four times and images.size is "
            f"{images.size}. Use at least {SMALLEST_IMAGE} pixels, or set the weight to 0."
        )
    for key in ("discriminator_weight", "perceptual_weight"):
        if tokenizer.num_labels is not None and getattr(train, key) > 0:
            raise ConfigError(
                f"tokenizer_train.{key} is {getattr(train, key)}, but labels (tokenizer.num_labels) are trained by cross entropy "
                f"alone. Set it to 0."
            )
    num_bits(config.codebook_size)  # that a code dataset can hold its codes


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


def settle(options: TokenizerJobOptions, begun: Mapping[str, Mapping[str, Any]] | None) -> TokenizerJobOptions:
    """Puts a number where options leave it to a default that has changed: a training goes on with what it began with.

    Args:
        options: what is asked for; what it says itself stays.
        begun: `fixed_options` of the training's newest commit; None for a new training.

    Raises:
        ConfigError: the channels of a new tokenizer cannot be shared out among its norms.
    """

    def number(section: str, key: str, new: Callable[[], Any]) -> Any:
        return new() if begun is None else begun[section].get(key, BEFORE_THE_OPTION[f"{section}.{key}"])

    tokenizer, train = options.tokenizer, options.tokenizer_train
    if tokenizer.num_norm_groups is None:
        groups = number("tokenizer", "num_norm_groups", lambda: num_norm_groups(tokenizer))
        tokenizer = dataclasses.replace(tokenizer, num_norm_groups=groups)
    if train.revive_share is None:
        train = dataclasses.replace(train, revive_share=number("tokenizer_train", "revive_share", lambda: revive_share(train)))
    return dataclasses.replace(options, tokenizer=tokenizer, tokenizer_train=train)


def fixed_options(options: TokenizerJobOptions) -> dict[str, dict[str, object]]:
    """The options, after `settle`, that a training keeps from its first step to its last. A longer one is another one unless nothing in
    it follows its length: not the learning rate, nor the time until which dead codes are revived, nor a temperature."""
    fixed = {
        section: {key: value for key, value in values.items() if key not in FREE.get(section, ())}
        for section, values in to_dict(options).items()
        if section != "scaling"
    }
    train = options.tokenizer_train
    if train.decay == "none" and train.revive_every_steps == 0 and options.tokenizer.quantizer != "gumbel":
        del fixed["tokenizer_train"]["num_samples"]
    return fixed
