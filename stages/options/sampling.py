"""Options of drawing codes from a transformer."""

from dataclasses import dataclass
from typing import Literal

from stages.options.declare import option


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How codes are drawn. A sample depends on the checkpoint, these options and its global index, nothing else."""

    path: str = option("runs/samples", "Folder of the samples that `sample` writes.")
    num_samples: int = option(64, "Samples that `sample` draws.", low=1)
    weights: Literal["average", "last"] = option(
        "average", "average: the averaged weights where the checkpoint has them; last: those of its step."
    )
    labels: tuple[int, ...] | None = option(None, "Classes to draw, cycled by sample index; all classes if not given.")
    cfg_scale: float = option(1.0, "Classifier-free guidance; 1 turns it off.", low=0.0)
    cfg_schedule: Literal["constant", "linear", "power-cosine"] = option(
        "constant", "How guidance grows over the codes."
    )
    cfg_power: float = option(2.75, "Exponent of power-cosine (RAR, Yu et al. 2024).", above=0.0)
    temperature: float = option(1.0, "Divides the logits.", above=0.0)
    top_k: int | None = option(None, "Keep the k likeliest codes; all if not given.", low=1)
    top_p: float = option(1.0, "Keep the smallest set of codes with this much probability.", above=0.0, high=1.0)
    seed: int = option(0, "Seeds the draws.", low=0)
    group_size: int = option(32, "Consecutive indices computed together, always whole, so shapes never change.", low=1)
