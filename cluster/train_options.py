"""The options of the `train` job, and the model that follows from them and a code dataset."""

import dataclasses

from pipeline.code_dataset import CodeDataset
from stages.errors import ConfigError
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
from stages.second_stage.transformer import TransformerConfig, transformer_config


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
    """The transformer for a code dataset.

    Raises:
        ConfigError: a condition that code datasets do not hold, or heads that do not divide the width.
    """
    if options.conditioning.name == "codes":
        raise ConfigError(
            "conditioning.name is codes, but code datasets hold no codes of a condition to train on. Use class or none."
        )
    return transformer_config(
        options.model,
        options.conditioning,
        codebook_size=dataset.codebook_size,
        grid=dataset.grid,
        num_classes=len(dataset.class_names),
    )
