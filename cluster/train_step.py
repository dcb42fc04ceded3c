"""One optimizer step of the second stage, as every rank takes it."""

import hashlib
from typing import Any

import torch

from cluster.deepspeed_engine import step_engine
from cluster.step_timer import BACKWARD, FORWARD, OPTIMIZER, StepTimer
from pipeline.loader import LoadedStep
from stages.second_stage.transformer import nll


def train_step(
    engine: Any, loaded: LoadedStep, timer: StepTimer, *, num_codes: int, seed: int, rank: int, world_size: int
) -> tuple[float, float]:
    """Forward, backward and optimizer over this rank's micro batches.

    Args:
        engine: DeepSpeed's, its learning rate set.
        loaded: the rank's rows.
        timer: its parts.
        num_codes: per row.
        seed: of the run; dropout is a function of it, the step and the rank.
        rank: of this process.
        world_size: number of ranks.

    Returns:
        The loss in nats, summed over this rank's valid rows, and the norm of the gradient over all ranks before it is clipped.
    """
    torch.manual_seed(step_seed(seed, loaded.step, rank))
    # DeepSpeed averages over ranks and micro batches; undoing that makes the gradient the mean over valid codes.
    scale = len(loaded.micro_batches) * world_size / (loaded.num_valid * num_codes)
    total, norm = torch.zeros((), dtype=torch.float64, device=engine.device), 0.0
    for batch in loaded.micro_batches:
        codes, labels, valid = (
            tensor.to(engine.device, non_blocking=True) for tensor in (batch.codes, batch.labels, batch.valid)
        )
        with timer.part(FORWARD):
            loss = (nll(engine(codes, labels), codes) * valid).sum()
        with timer.part(BACKWARD):
            engine.backward(loss * scale)
        total += loss.detach()
        with timer.part(OPTIMIZER):
            norm = step_engine(engine)
    return total.item(), norm


def step_seed(seed: int, step: int, rank: int) -> int:
    """What torch's generator is seeded with before a step, so that dropout follows from the step."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{step}:{rank}".encode()).digest()[:8], "little") >> 1
