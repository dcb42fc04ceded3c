"""Schedules of learning rates and of averages as pure functions of progress."""

import math


def warmup_cosine(position: float, warmup: float, total: float, floor: float) -> float:
    """Factor in [0, 1]: linear from 0 over `warmup`, then a half cosine down to `floor` at `total`."""
    if position < warmup:
        return position / warmup
    progress = min(1.0, (position - warmup) / max(1.0, total - warmup))
    return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))


def warmup_constant(position: float, warmup: float) -> float:
    """Factor in [0, 1]: linear from 0 over `warmup`, then 1."""
    return position / warmup if position < warmup else 1.0


def warmup_stable_decay(position: float, warmup: float, total: float, decay: float, floor: float) -> float:
    """Factor in [0, 1]: linear from 0 over `warmup`, then 1, then linear down to `floor` over the last `decay` of `total` (WSD: Hu et al.
    2024, MiniCPM, section 4).
    """
    remaining = max(0.0, total - position)
    falling = floor + (1.0 - floor) * remaining / decay if remaining < decay else 1.0
    return min(warmup_constant(position, warmup), falling)


def average_decay(decay: float, num_updates: float) -> float:
    """Decay of an exponential average at its update of that number, counted from 1. The average follows faster at first, as
    TensorFlow's ExponentialMovingAverage does.
    """
    return min(decay, (1.0 + num_updates) / (10.0 + num_updates))
