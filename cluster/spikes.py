"""When a step's loss or gradient means that the step must be undone, as a pure function of its record and the losses before it."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

NUM_STEPS_BEFORE = 64  # steps whose losses say what is usual
MIN_STEPS_BEFORE = 16
MIN_DEVIATION = 0.02  # share of the median loss below which a spread is noise of the estimate
NORMAL = 1.4826  # standard deviations of a normal distribution per median absolute deviation


def find_fault(loss: float, grad_norm: float, losses_before: Sequence[float], threshold: float) -> str | None:
    """Why a step must be undone, or None.

    A loss is a spike when it lies more than `threshold` robust standard deviations (1.4826 times the median absolute deviation)
    above the median of the steps before it.

    Args:
        loss: of the step, in nats per code.
        grad_norm: of the step.
        losses_before: of the steps before it, oldest first; the last `NUM_STEPS_BEFORE` count.
        threshold: 0 looks for NaN and infinity only.
    """
    if not math.isfinite(loss):
        return f"loss {loss}"
    if not math.isfinite(grad_norm):
        return f"gradient norm {grad_norm}"
    usual = losses_before[-NUM_STEPS_BEFORE:]
    if not threshold or len(usual) < MIN_STEPS_BEFORE:
        return None
    median = statistics.median(usual)
    spread = NORMAL * statistics.median(abs(value - median) for value in usual)
    limit = median + threshold * max(spread, MIN_DEVIATION * median)
    if loss <= limit:
        return None
    return f"loss {loss:.4f} above {limit:.4f}, from the {len(usual)} steps before it"


def find_not_finite(record: Mapping[str, Any]) -> str | None:
    """The first number of a step's record that is NaN or infinite, with its name, or None."""
    numbers = ((name, value) for name, value in record.items() if isinstance(value, float))
    return next((f"{name} {value}" for name, value in numbers if not math.isfinite(value)), None)
