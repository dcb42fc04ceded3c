"""The DeepSpeed engine of the second stage: configuration, construction, and whole tensors gathered from its shards."""

import os
from typing import Any

import torch
from torch import Tensor

from pipeline.loader import num_micro_batches
from stages.options import DeepSpeedOptions, OptimOptions, TrainOptions
from stages.schedule import warmup_constant, warmup_cosine, warmup_stable_decay
from stages.second_stage.optimizer import AveragingAdamW
from stages.second_stage.transformer import Transformer, TransformerConfig, parameter_groups

SHARED_MEMORY_OP = "deepspeed_shm_comm"


def engine_config(
    train: TrainOptions, optim: OptimOptions, deepspeed: DeepSpeedOptions, world_size: int
) -> dict[str, Any]:
    """DeepSpeed's configuration. Batch sizes are derived here and nowhere else; rows that pad a slice count in them."""
    num_accumulated = num_micro_batches(train.global_batch_size, train.micro_batch_size, world_size)
    bucket = {
        "reduce_bucket_size": deepspeed.bucket_size,
        "allgather_bucket_size": deepspeed.bucket_size,
        "stage3_prefetch_bucket_size": deepspeed.bucket_size,
        "stage3_max_live_parameters": deepspeed.bucket_size,
        "stage3_max_reuse_distance": deepspeed.bucket_size,
    }
    offload = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    zero: dict[str, Any] = {"stage": deepspeed.zero_stage, "overlap_comm": False, **bucket}
    if deepspeed.offload_optimizer:
        zero["offload_optimizer"] = offload
    if deepspeed.offload_parameters:
        zero["offload_param"] = offload
    return {
        "train_batch_size": train.micro_batch_size * num_accumulated * world_size,
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": num_accumulated,
        "gradient_clipping": optim.grad_clip,
        "bf16": {"enabled": train.precision == "bf16"},
        "zero_optimization": zero,
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

    # On CPUs DeepSpeed compiles a collective of its own under a lock file; a process that is killed there leaves the lock, and every
    # later training on the machine waits for it without end. gloo does the same work.
    ds.ops.__compatible_ops__[SHARED_MEMORY_OP] = False
    settings = engine_config(train, optim, deepspeed, world_size)
    torch.manual_seed(seed)
    model = Transformer(config, checkpoint_activations=train.activation_checkpointing)
    optimizer = AveragingAdamW(
        parameter_groups(model, optim.weight_decay),
        average_decay=optim.weight_average_decay,
        lr=optim.learning_rate,
        betas=(optim.betas[0], optim.betas[1]),
    )
    compile_blocks(model, train, deepspeed)
    engine, *_ = ds.initialize(model=model, optimizer=optimizer, config=settings)
    if deepspeed.zero_stage == 0 and train.precision == "bf16":
        _undo_first_step(engine)
    return engine


def compile_blocks(model: Transformer, train: TrainOptions, deepspeed: DeepSpeedOptions) -> None:
    """Compiles the blocks where asked to, or else where it pays: on GPUs, where it saves a third of the time; on CPUs it saves little and
    takes long to start."""
    if torch.cuda.is_available() and deepspeed.zero_stage < 3 if train.compile is None else train.compile:
        for block in model.blocks:
            block.compile(dynamic=False)


def _undo_first_step(engine: Any) -> None:
    """DeepSpeed lets an unsharded bf16 optimizer make one step on zero gradients, which decays weights and counts."""
    for weights, copies in zip(engine.optimizer.fp16_groups, engine.optimizer.fp32_groups):
        for weight, copy in zip(weights, copies):
            copy.data.copy_(weight)
    engine.basic_optimizer.state.clear()


def step_engine(engine: Any) -> float:
    """The engine's step after a backward pass. Returns the norm of the gradient over all ranks before it is clipped, or 0 where the
    optimizer makes no step."""
    is_last, norm = engine.is_gradient_accumulation_boundary(), 0.0
    # DeepSpeed's optimizers note the norm while they step. torch's own, which fp32 without sharding keeps, drops the gradients then.
    notes_norm = hasattr(engine.optimizer, "_global_grad_norm")
    if is_last and not notes_norm:
        gradients = [parameter.grad for parameter in engine.module.parameters() if parameter.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients))
    engine.step()
    return float(engine.get_global_grad_norm()) if is_last and notes_norm else norm


def learning_rate(optim: OptimOptions, train: TrainOptions, step: int) -> float:
    """The learning rate of one step, a pure function of the step."""
    per_step = train.global_batch_size
    warmup = optim.warmup_steps if optim.warmup_samples is None else optim.warmup_samples / per_step
    decay = optim.decay_steps if optim.decay_samples is None else optim.decay_samples / per_step
    floor = optim.min_learning_rate_ratio
    if optim.schedule == "constant":
        factor = warmup_constant(step + 1, warmup)
    elif optim.schedule == "cosine":
        factor = warmup_cosine(step + 1, warmup, train.num_steps, floor)
    else:
        factor = warmup_stable_decay(step + 1, warmup, train.num_steps, decay, floor)
    return optim.learning_rate * factor


def set_learning_rate(engine: Any, value: float) -> None:
    """Sets the learning rate of the coming step."""
    for group in engine.optimizer.param_groups:
        group["lr"] = value


def load_shards(engine: Any, folder: str, tag: str) -> bool:
    """Loads what DeepSpeed saved, but for weight decay and betas: those are what the options say, not what they said then.

    Returns whether there was anything.
    """
    asked = [{key: group[key] for key in ("weight_decay", "betas")} for group in engine.basic_optimizer.param_groups]
    loaded, _ = engine.load_checkpoint(folder, tag=tag)
    for group, values in zip(engine.basic_optimizer.param_groups, asked, strict=True):
        group |= values
    return loaded is not None


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
