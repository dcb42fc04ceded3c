"""Options of the nightly job and of the search over sampling options."""

from dataclasses import dataclass
from typing import Literal

from stages.options.declare import option


@dataclass(frozen=True, kw_only=True)
class NightlyOptions:
    """What `nightly` looks at and what it does with what it finds."""

    runs: tuple[str, ...] = option(
        (), "Folders of runs, or folders under which there are runs; run.path alone if empty. Local or s3://."
    )
    best: bool = option(True, "Beside the newest commit of a run, evaluate the one with the lowest validation NLL.")
    time_budget_seconds: float | None = option(
        None, "No evaluation starts that would end later, and what runs then is stopped; no limit if not given.", above=0.0
    )
    claim_seconds: float = option(
        900.0, "A claim that its nightly has not renewed for so long is taken over: that nightly is dead.", above=0.0
    )
    regression_threshold: float = option(
        3.0,
        "Standard errors by which a metric must be worse than an earlier value to be flagged; more where the best of many is meant.",
        above=0.0,
    )
    command: str | None = option(None, "Shell command run when something is flagged, with the JSON on its input.")
    webhook: str | None = option(
        None, "URL to which that JSON is posted; $NAME in it is taken from the environment, so that no secret is written."
    )


@dataclass(frozen=True, kw_only=True)
class SweepOptions:
    """What `evaluate --sweep` tries: every combination of these lists; the value in `sampling` where a list is empty."""

    cfg_scale: tuple[float, ...] = option((), "Guidance scales.", low=0.0)
    cfg_schedule: tuple[Literal["constant", "linear", "power-cosine"], ...] = option((), "Guidance schedules.")
    temperature: tuple[float, ...] = option((), "Temperatures.", above=0.0)
    top_k: tuple[int, ...] = option((), "Numbers of codes kept; 0 keeps all.", low=0)
    top_p: tuple[float, ...] = option((), "Nucleus probabilities.", above=0.0, high=1.0)
    num_samples: int = option(1000, "Samples per combination.", low=2)
    num_confirmed: int = option(
        3, "Best combinations measured again on evaluation.num_samples samples of another seed.", low=1
    )
    max_combinations: int = option(64, "More combinations than this are refused.", low=1)
    metric: str | None = option(None, "What decides; the distance of the samples if not given.")
