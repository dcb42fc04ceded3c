"""What a checkpoint of the second stage holds: the shards of DeepSpeed, and whole weights beside them."""

import os
from typing import Any

import torch.distributed as dist
from safetensors.torch import save_file

from cluster import universal
from cluster.checkpoints import AVERAGES, SHARDS, WEIGHTS
from cluster.deepspeed_engine import gather_weights
from cluster.optimizer_slices import gather_state, owned_slices
from stages.second_stage.optimizer import WEIGHT_AVERAGE


def save_engine(engine: Any, folder: str, *, saves_average: bool) -> None:
    """Writes this rank's part of an engine's state into a folder. Every rank must call it.

    Args:
        engine: DeepSpeed's.
        folder: local, of this rank alone.
        saves_average: whether the optimizer keeps averaged weights.
    """
    stage, rank = engine.zero_optimization_stage(), dist.get_rank()
    extra = {universal.PARAMETER_NAMES: [owned.name for owned in owned_slices(engine)]} if stage == 0 else {}
    engine.save_checkpoint(folder, tag=SHARDS, client_state=extra, save_latest=False)
    weights = gather_weights(engine, rank, stage)
    averages = gather_state(engine, WEIGHT_AVERAGE) if saves_average else {}
    if rank == 0:
        save_file(weights, os.path.join(folder, WEIGHTS))
    if averages:
        save_file(averages, os.path.join(folder, AVERAGES))


def saved_bytes(engine: Any, *, saves_average: bool) -> int:
    """Bytes that `save_engine` writes on one rank, at most: fp32 weights and state that it owns, and whole weights twice."""
    num_owned = sum(owned.size for owned in owned_slices(engine))
    num_parameters = sum(getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters())
    return 4 * ((3 + saves_average) * num_owned + (2 + saves_average) * num_parameters)
