"""The DeepSpeed engine of the second stage: configuration, construction, weights gathered for inference."""

import os
from typing import Any

import torch
from torch import Tensor

from stages.options import DeepSpeedOptions, OptimOptions, TrainOptions
from stages.schedule import warmup_constant, warmup_cosine
from stages.second_stage.transformer import Transformer, TransformerConfig, parameter_groups


def engine_config(
    train: TrainOptions, optim: OptimOptions, deepspeed: DeepSpeedOptions, world_size: int
) -> dict[str, Any]:
    """DeepSpeed's configuration. Batch sizes are derived here and nowhere else."""
    return {
        "train_batch_size": train.global_batch_size,
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": train.global_batch_size // (train.micro_batch_size * world_size),
        "gradient_clipping": optim.grad_clip,
        "bf16": {"enabled": train.precision == "bf16"},
        "zero_optimization": {"stage": deepspeed.zero_stage, "overlap_comm": False},
        # The optimizer is torch's own, also on CPU; DeepSpeed asks to be told that this is meant.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }


def build_engine(
    config: TransformerConfig,
    seed: int,
    train: TrainOptions,
    optim: OptimOptions,
    deepspeed: DeepSpeedOptions,
    world_size: int,
) -> Any:
    """A DeepSpeed engine around a freshly initialised transformer, the same on every rank.

    torch.distributed must be initialised.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    import deepspeed as ds

    settings = engine_config(train, optim, deepspeed, world_size)
    torch.manual_seed(seed)
    model = Transformer(config)
    optimizer = torch.optim.AdamW(
        parameter_groups(model, optim.weight_decay),
        lr=optim.learning_rate,
        betas=(optim.betas[0], optim.betas[1]),
        fused=True,
    )
    engine, *_ = ds.initialize(model=model, optimizer=optimizer, config=settings)
    return engine


def set_learning_rate(engine: Any, optim: OptimOptions, step: int, num_steps: int) -> float:
    """Sets and returns the learning rate of one step, a pure function of the step."""
    if optim.schedule == "constant":
        factor = warmup_constant(step + 1, optim.warmup_steps)
    else:
        factor = warmup_cosine(step + 1, optim.warmup_steps, num_steps, optim.min_learning_rate_ratio)
    for group in engine.optimizer.param_groups:
        group["lr"] = optim.learning_rate * factor
    return optim.learning_rate * factor


def gather_weights(engine: Any, rank: int, zero_stage: int) -> dict[str, Tensor]:
    """The whole model's weights on rank 0 as CPU tensors (empty on other ranks); every rank must call it.

    ZeRO-3 keeps only a slice per rank, so parameters are gathered one at a time to bound memory.
    """
    import deepspeed as ds

    weights = {}
    for name, parameter in engine.module.named_parameters():
        with ds.zero.GatheredParameters([parameter], enabled=zero_stage == 3):
            if rank == 0:
                weights[name] = parameter.detach().cpu().clone()
    return weights
