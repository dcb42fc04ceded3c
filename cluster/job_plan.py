"""Everything that follows from a configuration before any work starts: cross-field checks and derived numbers."""

import math
from typing import Any

from cluster.train_job import check_batch
from pipeline.code_dataset.codec import bytes_per_row, num_bits
from pipeline.views import expand_views
from stages.config import to_dict
from stages.errors import ConfigError
from stages.first_stage.tokenizer import tokenizer_config
from stages.first_stage.training import build_discriminator
from stages.options import Config
from stages.second_stage.transformer import num_parameters, transformer_config

MAX_CODE_BITS = 16


def check_config(config: Config) -> None:
    """Checks that no single section can make. Changes nothing.

    Raises:
        ConfigError: naming the keys, the values and the rule.
    """
    tokenizer_config(config.tokenizer, config.images)
    build_discriminator(config.tokenizer_train, config.images.channels, config.images.size)
    check_batch(config.train, config.scaling.num_workers)
    bits = num_bits(config.tokenizer.codebook_size)
    if bits > MAX_CODE_BITS:
        raise ConfigError(
            f"tokenizer.codebook_size is {config.tokenizer.codebook_size}, which needs {bits} bits per code, but the codes column holds at "
            f"most {MAX_CODE_BITS}. Use at most {1 << MAX_CODE_BITS}."
        )
    if len(config.optim.betas) != 2:
        raise ConfigError(
            f"optim.betas is {list(config.optim.betas)}, but AdamW takes two numbers. Write e.g. [0.9, 0.95]."
        )
    if config.evaluation.num_blocks > config.evaluation.num_samples:
        raise ConfigError(
            f"evaluation.num_blocks is {config.evaluation.num_blocks}, but it must be at most evaluation.num_samples = "
            f"{config.evaluation.num_samples}. Lower it."
        )


def derive(config: Config, num_images: int, num_classes: int) -> dict[str, dict[str, Any]]:
    """Derived numbers by group, for people to read and programs to use. Bytes, counts and FLOP are plain numbers."""
    tokenizer = tokenizer_config(config.tokenizer, config.images)
    side = config.images.size // tokenizer.downsample
    num_codes, num_views = side * side, len(expand_views(config.images.views))
    transformer = transformer_config(
        config.model,
        config.conditioning,
        codebook_size=tokenizer.codebook_size,
        grid=(side, side),
        num_classes=num_classes,
    )
    parameters = num_parameters(transformer)
    train, world_size = config.train, config.scaling.num_workers
    row_bytes = bytes_per_row(num_codes, num_bits(tokenizer.codebook_size))
    steps_per_epoch = math.ceil(num_images / train.global_batch_size)
    flop_per_row = row_flop(parameters, transformer.num_layers, transformer.hidden_size, num_codes)
    return {
        "code dataset": {
            "images": num_images,
            "views": num_views,
            "rows": num_images * num_views,
            "codes per image": num_codes,
            "bits per code": num_bits(tokenizer.codebook_size),
            "bytes per row": row_bytes,
            "bytes of codes": row_bytes * num_images * num_views,
            "shards": math.ceil(num_images / config.codes.shard_size),
        },
        "transformer": {
            "parameters": parameters,
            "FLOP per step": flop_per_row * train.global_batch_size,
            "FLOP of the run": flop_per_row * train.global_batch_size * train.num_steps,
        },
        "training": {
            "world size": world_size,
            "gradient accumulation steps": train.global_batch_size // (train.micro_batch_size * world_size),
            "steps per epoch": steps_per_epoch,
            "epochs": train.num_steps / steps_per_epoch,
            "commits": math.ceil(train.num_steps / train.checkpoint_every_steps),
        },
        "model state bytes per rank": {
            f"ZeRO-{stage}": model_state_bytes(parameters, stage, world_size, train.precision) for stage in range(4)
        },
    }


def row_flop(parameters: int, num_layers: int, hidden_size: int, num_codes: int) -> int:
    """FLOP of forward and backward for one row: 6 per parameter and position, plus attention's 12 L C T^2 (Chowdhery et al. 2022, B)."""
    return 6 * parameters * num_codes + 12 * num_layers * hidden_size * num_codes**2


def model_state_bytes(parameters: int, zero_stage: int, world_size: int, precision: str) -> int:
    """Weights, gradients and AdamW state per rank (Rajbhandari et al. 2020, section 3).

    fp32: 4 + 4 + 8 bytes per parameter; bf16: 2 + 2, and 12 for the fp32 copy with its moments.
    """
    weights, gradients, optimizer = (4, 4, 8) if precision == "fp32" else (2, 2, 12)
    shares = [world_size if zero_stage >= stage else 1 for stage in (3, 2, 1)]
    return math.ceil(parameters * sum(size / share for size, share in zip((weights, gradients, optimizer), shares)))


def render(config: Config, derived: dict[str, dict[str, Any]]) -> str:
    """The plan as text: the resolved configuration, then the derived numbers."""
    lines = []
    for section, values in to_dict(config).items():
        lines.append(f"{section}: " + ", ".join(f"{key}={value}" for key, value in values.items()))
    for group, values in derived.items():
        lines += ["", group] + [f"  {name:<28} {_readable(value)}" for name, value in values.items()]
    return "\n".join(lines)


def _readable(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.2f}"
    return f"{value:,}" if value < 10**12 else f"{value:.3e}"
