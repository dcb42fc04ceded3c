"""The options of the `train` job, and the model that follows from them and a code dataset."""

import dataclasses

from pipeline.code_dataset import CodeDataset
from pipeline.condition_codes import ConditionCodes
from pipeline.loader import open_conditions
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


def training_conditions(options: TrainJobOptions, dataset: CodeDataset, *, verify: bool) -> ConditionCodes | None:
    """The codes that the images of a code dataset are conditioned on; None where the condition is another. See `open_conditions`."""
    conditioning = options.conditioning
    if conditioning.name != "codes":
        return None
    return open_conditions(
        conditioning.codes_path, dataset, options.codes, verify=verify, key="conditioning.codes_path"
    )


def dataset_transformer_config(
    options: TrainJobOptions, dataset: CodeDataset, conditions: ConditionCodes | None
) -> TransformerConfig:
    """The transformer for a code dataset, and the codes of its conditions where there are any.

    Raises:
        ConfigError: heads that do not divide the width, or another number of condition tokens than the dataset of conditions has.
    """
    conditioning, num_classes = options.conditioning, len(dataset.class_names)
    if conditions is not None:
        num_tokens, num_classes = conditions.dataset.num_codes, conditions.dataset.codebook_size
        if conditioning.num_tokens not in (None, num_tokens):
            raise ConfigError(
                f"conditioning.num_tokens is {conditioning.num_tokens}, but {conditioning.codes_path} has {num_tokens} codes per image. "
                f"Tokenize conditions of another size, or leave num_tokens out."
            )
        conditioning = dataclasses.replace(conditioning, num_tokens=num_tokens)
    return transformer_config(
        options.model,
        conditioning,
        codebook_size=dataset.codebook_size,
        grid=dataset.grid,
        num_classes=num_classes,
    )
