"""Everything that follows from a configuration before any work starts: cross-field checks and derived numbers."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from cluster.estimates import GPUS, USABLE_MEMORY, rank_memory, row_flop, steps_per_second
from cluster.tokenizer_options import check_networks, num_steps
from cluster.train_job import check_batch
from pipeline.code_dataset.codec import bytes_per_row, num_bits
from pipeline.inputs import check_fit
from pipeline.job_options import check_addresses
from pipeline.loader import num_micro_batches
from pipeline.sources.map_files import check_map_names
from pipeline.tokenizers import tokenizer_architecture
from pipeline.views import expand_views
from stages.config import to_dict
from stages.errors import ConfigError
from stages.first_stage.tokenizer_config import TokenizerConfig, num_norm_groups, tokenizer_config
from stages.options import (
    Config,
    DeepSpeedOptions,
    ScalingOptions,
    TokenizerOptions,
    TokenizerTrainOptions,
    TrainOptions,
)
from stages.second_stage.sampling import check_labels
from stages.second_stage.transformer import TransformerConfig, num_parameters, transformer_config

ZERO_STAGES = range(4)


def check_config(config: Config) -> None:
    """Checks that no single section can make. Changes nothing.

    Raises:
        ConfigError: naming the keys, the values and the rule.
    """
    check_addresses(config)
    check_map_names(config.source, config.codes.conditions)
    _check_num_workers(config.scaling)
    check_batch(config.train, config.scaling)
    _check_zero_stage(config.deepspeed, config.train)
    _check_retention(config.train)
    if len(config.optim.betas) != 2:
        raise ConfigError(
            f"optim.betas is {list(config.optim.betas)}, but AdamW takes two numbers. Write e.g. [0.9, 0.95]."
        )


def _check_num_workers(scaling: ScalingOptions) -> None:
    numbers = scaling.num_workers
    if isinstance(numbers, tuple) and (len(numbers) != 2 or numbers[0] > numbers[1]):
        raise ConfigError(
            f"scaling.num_workers is {list(numbers)}, but a list must be [min, max] with min at most max. Write e.g. [2, 4], or one number."
        )


def _check_zero_stage(deepspeed: DeepSpeedOptions, train: TrainOptions) -> None:
    stage = deepspeed.zero_stage
    if deepspeed.offload_optimizer and stage < 1:
        raise ConfigError(
            f"deepspeed.offload_optimizer is true, but it needs deepspeed.zero_stage of at least 1, which is {stage}. Set "
            f"deepspeed.zero_stage=1 or turn it off."
        )
    if deepspeed.offload_parameters and stage != 3:
        raise ConfigError(
            f"deepspeed.offload_parameters is true, but it needs deepspeed.zero_stage=3, which is {stage}. Set deepspeed.zero_stage=3 "
            f"or turn it off."
        )
    if train.compile and stage == 3:
        raise ConfigError(
            "train.compile is true, but with deepspeed.zero_stage=3 weights are gathered inside the blocks, where compiled code cannot "
            "wait for them. Lower deepspeed.zero_stage or set train.compile=false."
        )


def _check_retention(train: TrainOptions) -> None:
    if train.keep_best and not train.validation_path:
        raise ConfigError(
            f"train.keep_best is {train.keep_best}, but without train.validation_path no commit has a validation NLL. Name a code dataset "
            f"of held-out images, or set train.keep_best=0."
        )


def stored_tokenizer(config: Config) -> TokenizerConfig | None:
    """The architecture of the tokenizer at `tokenizer.path`; None where one is yet to be trained.

    Raises:
        ConfigError: it does not fit the images, or cannot be trained as configured.
        ArtefactError: it is damaged.
    """
    stored = tokenizer_architecture(config.tokenizer.path)
    if stored is None:
        check_networks(config.tokenizer, config.tokenizer_train, config.images)
    else:
        check_fit(stored, config.images, config.tokenizer)
    return stored


def planned_transformer(config: Config, num_classes: int, tokenizer: TokenizerConfig | None = None) -> TransformerConfig:
    """The transformer on the code dataset that `config` describes, of this tokenizer or else the one that `config` trains, and images of
    so many classes."""
    tokenizer = tokenizer or tokenizer_config(config.tokenizer, config.images)
    side = config.images.size // tokenizer.downsample
    conditioning = config.conditioning
    if conditioning.name == "codes":  # of the condition's tokenizer only its codes tell more; most are as large as the image's
        num_classes = tokenizer.codebook_size
        conditioning = dataclasses.replace(conditioning, num_tokens=conditioning.num_tokens or side**2)
    return transformer_config(
        config.model,
        conditioning,
        codebook_size=tokenizer.codebook_size,
        grid=(side, side),
        num_classes=num_classes,
    )


def derive(
    config: Config,
    num_images: int,
    num_classes: int,
    *,
    tokenizer: TokenizerConfig | None = None,
    gpu: str | None = None,
    mfu: float = 0.4,
    hours: float | None = None,
) -> dict[str, dict[str, Any]]:
    """Derived numbers by group, for people to read and programs to use. Bytes, counts and FLOP are plain numbers.

    Where scaling.num_workers is [min, max], a number that depends on it is the list of both.

    Args:
        config: a checked one.
        num_images: for training.
        num_classes: of the images.
        tokenizer: from `stored_tokenizer`.
        gpu: a name from cluster.estimates.GPUS: adds the time that the run takes on it, and whether it has the memory.
        mfu: model FLOP utilisation, the share of the GPU's peak that the run reaches.
        hours: adds how fast the run must be to take so long.

    Raises:
        ConfigError: no such GPU, or one whose peak says nothing about this run; `mfu` or `hours` is out of range; there is no such
            transformer, or there are not the classes to be drawn.
    """
    _check_questions(config.train, gpu, mfu, hours)
    if config.conditioning.name != "codes":
        check_labels(config.sampling, 0 if config.conditioning.name == "none" else num_classes)
    transformer, train = planned_transformer(config, num_classes, tokenizer), config.train
    world_sizes = sorted({config.scaling.min_workers, config.scaling.max_workers})
    flop_per_step = train.global_batch_size * row_flop(transformer)
    steps_per_epoch = math.ceil(num_images / train.global_batch_size)
    memory = {size: _memory(config, transformer, size, gpu) for size in world_sizes}
    groups = {
        **({} if tokenizer else {"tokenizer training": _tokenizer_training(config.tokenizer, config.tokenizer_train, num_images)}),
        "code dataset": _code_dataset(config, num_images, transformer),
        "transformer": {
            "parameters": num_parameters(transformer),
            "FLOP per step": flop_per_step,
            "FLOP of the run": flop_per_step * train.num_steps,
        },
        "training": {
            "world size": _by_size(world_sizes, lambda size: size),
            "gradient accumulation steps": _by_size(
                world_sizes, lambda size: num_micro_batches(train.global_batch_size, train.micro_batch_size, size)
            ),
            "steps per epoch": steps_per_epoch,
            "epochs": train.num_steps / steps_per_epoch,
            "commits": math.ceil(train.num_steps / train.checkpoint_every_steps),
        },
        "model state bytes per rank": {
            f"ZeRO-{stage}": _by_size(world_sizes, lambda size: memory[size][f"ZeRO-{stage}"]["model state"])
            for stage in ZERO_STAGES
        },
    }
    groups |= {f"memory per rank at world size {size}": memory[size] for size in world_sizes}
    if gpu is not None:
        groups[f"on {gpu} at {mfu:.0%} of its peak"] = _duration(train.num_steps, flop_per_step, world_sizes, gpu, mfu)
    if hours is not None:
        groups[f"to finish in {hours:g} hours"] = {
            "steps per second": train.num_steps / hours / 3600,
            "FLOP per second": flop_per_step * train.num_steps / hours / 3600,
        }
    return groups


def _check_questions(train: TrainOptions, gpu: str | None, mfu: float, hours: float | None) -> None:
    if gpu is not None and gpu not in GPUS:
        raise ConfigError(f"--gpu is {gpu}, but it must be one of: {', '.join(GPUS)}. Choose the one nearest to yours.")
    if gpu is not None and train.precision != "bf16":
        raise ConfigError(
            f"--gpu is {gpu}, but its peak is that of bf16 and train.precision is {train.precision}. Use train.precision=bf16."
        )
    if not 0 < mfu <= 1:
        raise ConfigError(f"--mfu is {mfu:g}, but it must be above 0 and at most 1. 0.4 is usual.")
    if hours is not None and not hours > 0:
        raise ConfigError(f"--hours is {hours:g}, but it must be above 0. Raise it.")


def _by_size(world_sizes: list[int], value: Callable[[int], Any]) -> Any:
    """The value at the one world size, or the list of those at the smallest and the largest."""
    values = [value(size) for size in world_sizes]
    return values[0] if len(values) == 1 else values


def _tokenizer_training(tokenizer: TokenizerOptions, train: TokenizerTrainOptions, num_images: int) -> dict[str, Any]:
    steps = num_steps(train)
    numbers: dict[str, Any] = {
        "steps": steps,
        "epochs": steps * train.global_batch_size / num_images,
        "commits": math.ceil(steps / train.checkpoint_every_steps),
        "groups of channels in norms": num_norm_groups(tokenizer),
    }
    if train.discriminator_weight:
        start, warm = train.discriminator_start_samples, train.discriminator_warm_samples
        first = 0 if warm is None else max(0, start - warm)
        numbers["discriminator learns from step"] = math.ceil(first / train.global_batch_size)
        numbers["discriminator counts from step"] = math.ceil(start / train.global_batch_size)
    return numbers


def _code_dataset(config: Config, num_images: int, transformer: TransformerConfig) -> dict[str, Any]:
    num_views, bits = len(expand_views(config.images.views)), num_bits(transformer.codebook_size)
    row_bytes = bytes_per_row(transformer.num_codes, bits)
    return {
        "images": num_images,
        "views": num_views,
        "rows": num_images * num_views,
        "codes per image": transformer.num_codes,
        "codebook size": transformer.codebook_size,
        "bits per code": bits,
        "bytes per row": row_bytes,
        "bytes of codes": row_bytes * num_images * num_views,
        "shards": math.ceil(num_images / config.codes.shard_size),
    }


def _memory(config: Config, transformer: TransformerConfig, world_size: int, gpu: str | None) -> dict[str, Any]:
    """Bytes by ZeRO stage, with and without activation checkpointing; with a GPU also whether it has them."""
    stages = {}
    for stage in ZERO_STAGES:
        plain, checkpointed = (
            rank_memory(
                transformer,
                config.train,
                config.optim,
                config.deepspeed,
                zero_stage=stage,
                world_size=world_size,
                use_gpu=config.scaling.use_gpu or gpu is not None,
                checkpointing=checkpointing,
            )
            for checkpointing in (False, True)
        )
        parts = {
            "weights": plain.weights,
            "gradients": plain.gradients,
            "optimizer": plain.optimizer,
            "buffers": plain.buffers,
            "step": plain.step,
            "logits": plain.logits,
            "activations": plain.activations,
            "activations checkpointed": checkpointed.activations,
            "host": plain.host,
            "model state": plain.weights + plain.gradients + plain.optimizer + plain.host,
            "peak": plain.peak,
            "peak checkpointed": checkpointed.peak,
        }
        if gpu is not None:
            usable = USABLE_MEMORY * GPUS[gpu].memory
            parts |= {"fits": plain.peak <= usable, "fits checkpointed": checkpointed.peak <= usable}
        stages[f"ZeRO-{stage}"] = parts
    return stages


def _duration(num_steps: int, flop_per_step: int, world_sizes: list[int], gpu: str, mfu: float) -> dict[str, Any]:
    def rate(size: int) -> float:
        return steps_per_second(flop_per_step, size, GPUS[gpu], mfu)

    return {
        "steps per second": _by_size(world_sizes, rate),
        "hours": _by_size(world_sizes, lambda size: num_steps / rate(size) / 3600),
        "GPU-hours": _by_size(world_sizes, lambda size: size * num_steps / rate(size) / 3600),
    }


def render(config: Config, derived: dict[str, dict[str, Any]]) -> str:
    """The plan as text: the resolved configuration, then the derived numbers."""
    lines = []
    for section, values in to_dict(config).items():
        lines.append(f"{section}: " + ", ".join(f"{key}={value}" for key, value in values.items()))
    for group, values in derived.items():
        if group.startswith("memory per rank"):
            lines += ["", f"{group}, GB (parts are not full at the same time, so the peak is less than their sum)"]
            lines += _memory_table(values)
        else:
            lines += ["", group] + [f"  {name:<28} {_readable(value)}" for name, value in values.items()]
    return "\n".join(lines)


def _memory_table(stages: dict[str, dict[str, Any]]) -> list[str]:
    """One line per ZeRO stage and one column per part; `host` and `model state` only where they say something."""
    names = list(next(iter(stages.values())))
    names = [
        name
        for name in names
        if name != "model state" and any(parts[name] for parts in stages.values()) or name.startswith("fits")
    ]
    lines = ["  " + " " * 6 + "".join(f"  {name}" for name in names)]
    for stage, parts in stages.items():
        cells = [f"{_cell(parts[name]):>{len(name)}}" for name in names]
        lines.append(f"  {stage}" + "".join(f"  {cell}" for cell in cells))
    return lines


def _cell(value: int | bool) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value / 1e9:.3g}"


def _readable(value: Any) -> str:
    if isinstance(value, list):
        return " to ".join(_readable(item) for item in value)
    if isinstance(value, float):
        return f"{value:.2f}" if 0.1 <= value < 10**6 else f"{value:.3g}"
    return f"{value:,}" if value < 10**12 else f"{value:.3e}"
