"""What a run of the second stage costs, as pure functions: FLOP, memory per rank, hours on a GPU.

Memory is what torch allocates in eager mode with DeepSpeed 0.19.8 and the settings of cluster.deepspeed_engine. `benchmarks/memory.py`
measures it.
"""

import math
from dataclasses import dataclass
from typing import Literal

from pipeline.loader import num_micro_batches
from stages.options import DeepSpeedOptions, OptimOptions, TrainOptions
from stages.second_stage.transformer import TransformerConfig, block_matrix_sizes, matrix_sizes, other_sizes

# Constants of DeepSpeed: what stage 0 reduces at once (engine.py, MEMORY_OPT_ALLREDUCE_SIZE), and up to which size stage 3 leaves
# a parameter whole (stage3_param_persistence_threshold).
STAGE_0_BUCKET = 500_000_000
PERSISTENT_SIZE = 100_000
# Share of a GPU's memory that a plan may fill: CUDA, NCCL and gaps between blocks take the rest.
USABLE_MEMORY = 0.9


@dataclass(frozen=True)
class Gpu:
    """Dense bf16 peak in FLOP/s and memory in bytes."""

    peak_flop: float
    memory: int


# NVIDIA's data sheets: A100 80GB SXM, H100 SXM and H200 SXM (which print the peak with sparsity, twice this), HGX B200, L40S.
GPUS = {
    "A100": Gpu(312e12, 80 * 10**9),
    "H100": Gpu(989.4e12, 80 * 10**9),
    "H200": Gpu(989.4e12, 141 * 10**9),
    "B200": Gpu(2250e12, 180 * 10**9),
    "L40S": Gpu(362.05e12, 48 * 10**9),
}


def row_flop(config: TransformerConfig) -> int:
    """FLOP of forward and backward for one row: 6 per weight of a matrix and position, and attention's 12 L C T^2 as if it were not
    causal (Chowdhery et al. 2022, appendix B). An embedding is looked up and costs nothing; what activation checkpointing computes
    again, and what a conditioning of the user's own computes, does not count.
    """
    head = config.codebook_size * config.hidden_size
    attention = 12 * config.num_layers * config.hidden_size * config.num_positions**2
    return 6 * (sum(block_matrix_sizes(config)) * config.num_positions + head * config.num_codes) + attention


def steps_per_second(flop_per_step: float, num_gpus: int, gpu: Gpu, mfu: float) -> float:
    """Optimizer steps per second if every GPU reaches the share `mfu` of its peak."""
    return num_gpus * gpu.peak_flop * mfu / flop_per_step


def activation_bytes(
    config: TransformerConfig,
    *,
    precision: Literal["fp32", "bf16"],
    num_rows: int,
    use_gpu: bool,
    checkpointing: bool,
) -> int:
    """What autograd keeps of one forward pass for the backward pass, without the logits.

    With checkpointing: the input of every block, and everything of the one block that is computed again.
    """
    c, size, num_heads = config.hidden_size, 4 if precision == "fp32" else 2, config.num_heads
    norm = size * c  # its input; the scale of each vector is counted below
    # Kept: the input of the projection, its output (by the norms of queries and keys, and as values), rotated queries and keys, what is
    # mixed, with its logarithmic sums, and that again with its heads side by side.
    attention = norm + 8 * size * c + 4 * num_heads
    if precision == "bf16" and not use_gpu:  # two products: a copy of the values, what is mixed once, and all probabilities
        probabilities = size * num_heads * config.num_positions
        attention = norm + size * c * (8 if config.qk_norm else 5) + probabilities
    ffn = norm + size * (c + (2 if config.ffn == "gelu" else 4) * config.ffn_size)
    mask = (1 if use_gpu else size) * c
    num_scales = 2 + 2 * num_heads * config.qk_norm
    block = attention + ffn + 2 * mask * (config.residual_dropout > 0) + (4 if use_gpu else size) * num_scales
    edges = norm + size * c + mask * (config.embedding_dropout > 0)
    blocks = config.num_layers * size * c + block if checkpointing else config.num_layers * block
    return num_rows * config.num_positions * (blocks + edges)


def logits_bytes(config: TransformerConfig, num_rows: int) -> int:
    """The fp32 log-probabilities and two gradients of their size, when the backward pass begins."""
    return 12 * num_rows * config.num_codes * config.codebook_size


@dataclass(frozen=True, kw_only=True)
class RankMemory:
    """Memory of one rank. Not all parts are full at the same time, so `peak` is less than their sum.

    Attributes:
        weights: in the precision of the computation.
        gradients: likewise.
        optimizer: fp32 weights, moments and the weight average.
        buffers: in which collectives reduce gradients and gather weights.
        step: gradients copied for the optimizer.
        activations: kept for the backward pass.
        logits: of the loss.
        host: state that is offloaded to the memory of the node; on a CPU it counts in the peak.
        peak: the largest sum at any time, which is in `phase`: build, forward, backward or step.
    """

    weights: int
    gradients: int
    optimizer: int
    buffers: int
    step: int
    activations: int
    logits: int
    host: int
    peak: int
    phase: str


@dataclass(frozen=True)
class _Sizes:
    """Bytes that the parts of `rank_memory` are made of.

    Attributes:
        element: of one weight.
        whole: all weights.
        shard: a rank's share of them.
        group: all weights of the larger optimizer group.
        fp32: a factor from `element` to fp32.
        bucket: what one collective takes.
        copy: its working copy; a gradient larger than the bucket is reduced alone.
        gathered: weights that stage 3 has whole, and the ones on their way.
        persistent: weights that stage 3 leaves whole.
        largest: the largest weight.
    """

    element: int
    whole: int
    shard: int
    group: int
    fp32: int
    bucket: int
    copy: int
    gathered: int
    persistent: int
    largest: int


def _sizes(config: TransformerConfig, precision: str, bucket_size: int, world_size: int, use_gpu: bool) -> _Sizes:
    matrices, all_sizes = matrix_sizes(config), matrix_sizes(config) + other_sizes(config)
    element, parameters, largest = 4 if precision == "fp32" else 2, sum(all_sizes), max(all_sizes)
    filled = min(bucket_size, parameters)
    return _Sizes(
        element=element,
        whole=element * parameters,
        shard=element * math.ceil(parameters / world_size),
        group=element * sum(matrices),
        fp32=4 // element,
        bucket=element * (bucket_size if use_gpu else filled),
        copy=element * max(filled, largest),
        gathered=element * min(2 * filled + largest, parameters),
        persistent=element * sum(n for n in all_sizes if n <= PERSISTENT_SIZE),
        largest=element * largest,
    )


def rank_memory(
    config: TransformerConfig,
    train: TrainOptions,
    optim: OptimOptions,
    deepspeed: DeepSpeedOptions,
    *,
    zero_stage: int,
    world_size: int,
    use_gpu: bool,
    checkpointing: bool,
) -> RankMemory:
    """Memory of one rank at a ZeRO stage (Rajbhandari et al. 2020), as DeepSpeed lays it out. Offloading counts where the stage has it.

    On a GPU the allocator holds what is reserved; on a CPU only what was written to counts.
    """
    sizes = _sizes(config, train.precision, deepspeed.bucket_size, world_size, use_gpu)
    parts = _state(sizes, zero_stage, optim.weight_average_decay > 0) | _buffers(sizes, zero_stage)
    parts |= {"host": 0}
    if deepspeed.offload_optimizer and zero_stage >= 1:
        parts = _offload_optimizer(parts, sizes, zero_stage)
    if deepspeed.offload_parameters and zero_stage == 3:
        parts |= {"weights": sizes.persistent, "host": parts["host"] + sizes.shard}
    parts["activations"] = activation_bytes(
        config,
        precision=train.precision,
        num_rows=train.micro_batch_size,
        use_gpu=use_gpu,
        checkpointing=checkpointing,
    )
    parts["logits"] = logits_bytes(config, train.micro_batch_size)
    accumulates = num_micro_batches(train.global_batch_size, train.micro_batch_size, world_size) > 1
    phases = _phases(parts, sizes, zero_stage, world_size, use_gpu, accumulates)
    phase = max(phases, key=lambda name: phases[name])
    return RankMemory(**parts, peak=phases[phase], phase=phase)


def _state(sizes: _Sizes, zero_stage: int, averages: bool) -> dict[str, int]:
    """Weights, gradients and optimizer state. In fp32 stage 0 works on the weights themselves; all else has fp32 copies of them."""
    optimized = sizes.fp32 * (sizes.shard if zero_stage else sizes.whole)
    copies = 0 if zero_stage == 0 and sizes.fp32 == 1 else 1
    return {
        "weights": sizes.shard + sizes.persistent if zero_stage == 3 else sizes.whole,
        "gradients": sizes.shard if zero_stage >= 2 else sizes.whole,
        "optimizer": optimized * (copies + 2 + averages),
    }


def _buffers(sizes: _Sizes, zero_stage: int) -> dict[str, int]:
    """Buffers of collectives, and copies of gradients in the step: in fp32 where they were not, flat where the state is sharded."""
    if zero_stage == 0:
        buffers = min(sizes.whole, STAGE_0_BUCKET * sizes.element)
        return {"buffers": buffers, "step": 0 if sizes.fp32 == 1 else sizes.fp32 * sizes.whole}
    gathered = sizes.gathered if zero_stage == 3 else 0
    flat = sizes.group * sizes.shard // sizes.whole
    return {
        "buffers": sizes.bucket + sizes.copy + gathered,
        "step": flat if sizes.fp32 == 1 else (1 + sizes.fp32) * flat,
    }


def _offload_optimizer(parts: dict[str, int], sizes: _Sizes, zero_stage: int) -> dict[str, int]:
    """The state moves to the host, with fp32 gradients and a buffer for what comes and goes."""
    return parts | {
        "gradients": sizes.whole if zero_stage == 1 else 0,
        "optimizer": 0,
        "buffers": parts["buffers"] + sizes.largest,
        "step": 0,
        "host": parts["optimizer"] + (1 + sizes.fp32) * sizes.shard,
    }


def _phases(
    parts: dict[str, int], sizes: _Sizes, zero_stage: int, world_size: int, use_gpu: bool, accumulates: bool
) -> dict[str, int]:
    """Bytes on the device at the fullest moment of each phase."""
    gradients, buffers = parts["gradients"], parts["buffers"]
    resident = parts["weights"] + parts["optimizer"] + (0 if use_gpu else parts["host"])
    graph = parts["activations"] + parts["logits"]
    build = (
        sizes.whole if use_gpu else 4 * sizes.whole // sizes.element
    )  # DeepSpeed gets the model whole, on CPUs in fp32
    if zero_stage == 0:
        forward, backward, step = gradients * accumulates + graph, gradients + buffers, gradients
    elif zero_stage == 1:
        # Buckets take the place of the gradients that fill them; a rank's share of the gradients is reserved with the first.
        forward = gradients * accumulates + graph + sizes.bucket * use_gpu
        backward, step = gradients + sizes.copy + sizes.shard * use_gpu, sizes.shard
    elif zero_stage == 2:
        # The last rank's share is complete when 1 / W of the backward pass is done.
        forward = gradients * accumulates + graph + sizes.bucket * use_gpu
        backward = gradients * (1 + accumulates) + buffers + parts["activations"] * (world_size - 1) // world_size
        step = gradients
    else:
        forward = backward = gradients + graph + buffers
        step = gradients + sizes.bucket
    step += parts["step"]
    if zero_stage in (1, 2):
        # One optimizer group after the other is flattened; gloo gathers its new weights beside the old ones, NCCL in place.
        build, step = build + sizes.group, max(step, 0 if use_gpu else sizes.group)
    return {
        "build": build,
        "forward": resident + forward,
        "backward": resident + backward,
        "step": resident + step,
    }
