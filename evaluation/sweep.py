"""The search for sampling options: every combination on few samples, the best of them again on many.

Every trial is an ordinary record of the history, so a search that was stopped goes on where it was, and each number in it
can be verified. The best few are confirmed with another seed: the best of many noisy values looks better than it is.
"""

import dataclasses
import itertools
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml

from cluster.checkpoints import SAMPLED_FROM, resolve_checkpoint
from evaluation.compare import direction
from evaluation.evaluate import EvaluateOptions, evaluate
from evaluation.hashing import canonical_hash
from evaluation.records import Record
from pipeline import storage
from stages.config import to_dict
from stages.errors import ConfigError
from stages.options import SamplingOptions, SweepOptions

logger = logging.getLogger(__name__)

SEARCHED = ("cfg_scale", "cfg_schedule", "temperature", "top_k", "top_p")


@dataclass(frozen=True)
class Trial:
    """One combination, measured."""

    sampling: SamplingOptions
    record: Record
    metric: str

    @property
    def value(self) -> float:
        return self.record.metrics[self.metric]["value"]

    def to_dict(self) -> dict[str, Any]:
        """For the summary: the searched options, the value with its error bar, and the record."""
        chosen = {name: getattr(self.sampling, name) for name in SEARCHED}
        error = self.record.metrics[self.metric]["standard_error"]
        return {**chosen, "value": self.value, "standard_error": error, "record": self.record.path}


def sweep(options: EvaluateOptions, settings: SweepOptions) -> dict[str, Any]:
    """Searches, confirms, and writes the best combination as YAML that `-c` takes on top. Ray must be connected.

    The options as they are, without any change, are always among those that are tried and confirmed.

    Returns:
        metric, trials and confirmed (best first), and `config`: the path of the YAML file.

    Raises:
        ConfigError: nothing to search, too many combinations, or a metric that says nothing. Else like `evaluate`.
    """
    found = list(combinations(options.sampling, settings))
    check_sweep(found, settings)
    # A training beside this may publish others meanwhile.
    commit = resolve_checkpoint(options.checkpoint or "latest", options.run.path, SAMPLED_FROM)
    options = dataclasses.replace(options, checkpoint=commit.path)
    few = dataclasses.replace(options.evaluation, num_samples=settings.num_samples)
    trials = []
    for number, sampling in enumerate(found, 1):
        trials.append(_try(dataclasses.replace(options, evaluation=few), sampling, settings.metric))
        logger.info("Combination %d of %d: %s", number, len(found), _line(trials[-1]))
    ranked = _best_first(trials)
    chosen = [trial.sampling for trial in ranked[: settings.num_confirmed]]
    if options.sampling not in chosen:
        chosen.append(options.sampling)
    seed = options.draws().seed + 1
    many = dataclasses.replace(options, seed=seed)
    confirmed = _best_first([_try(many, sampling, settings.metric) for sampling in chosen])
    for trial in confirmed:
        logger.info("Confirmed: %s", _line(trial))
    return {
        "metric": confirmed[0].metric,
        "trials": [trial.to_dict() for trial in ranked],
        "confirmed": [trial.to_dict() for trial in confirmed],
        "config": _write(options, confirmed),
    }


def combinations(sampling: SamplingOptions, settings: SweepOptions) -> Iterator[SamplingOptions]:
    """Every combination of the lists in `settings`, the options as they are first, none twice."""
    lists: dict[str, tuple[Any, ...]] = {name: getattr(settings, name) for name in SEARCHED if getattr(settings, name)}
    if "top_k" in lists:
        lists["top_k"] = tuple(k or None for k in lists["top_k"])
    products = itertools.product(*lists.values())
    changes: list[dict[str, Any]] = [{}, *(dict(zip(lists, values)) for values in products)]
    for change in changes:
        if change.get("cfg_scale", sampling.cfg_scale) == 1.0:
            change.pop("cfg_schedule", None)  # without guidance its schedule says nothing
    yield from dict.fromkeys(dataclasses.replace(sampling, **change) for change in changes)


def check_sweep(found: list[SamplingOptions], settings: SweepOptions) -> None:
    """Refuses a search without alternatives, one that is too long, and a metric without a better direction."""
    if len(found) < 2:
        raise ConfigError(
            f"sweep has no list with another value, but a search needs one in {', '.join(SEARCHED)}. "
            "Write e.g. sweep.cfg_scale=[1.5,2,3]."
        )
    if len(found) > settings.max_combinations:
        raise ConfigError(
            f"sweep has {len(found)} combinations, but sweep.max_combinations is {settings.max_combinations}. Shorten its lists, or "
            "raise that."
        )
    if settings.metric is not None and direction(settings.metric) == 0:
        raise ConfigError(
            f"sweep.metric is {settings.metric}, but neither higher nor lower values of it are better. Choose e.g. gfd."
        )


def _try(options: EvaluateOptions, sampling: SamplingOptions, metric: str | None) -> Trial:
    record = evaluate(dataclasses.replace(options, sampling=sampling))
    name = metric or next((name for name in ("gfid", "gfd") if name in record.metrics), "gfd")
    if name not in record.metrics:
        raise ConfigError(
            f"sweep.metric is {name}, but it is none of those measured. Choose one of: {', '.join(record.metrics)}."
        )
    return Trial(sampling, record, name)


def _best_first(trials: list[Trial]) -> list[Trial]:
    return sorted(trials, key=lambda trial: direction(trial.metric) * trial.value)


def _line(trial: Trial) -> str:
    content = trial.to_dict()
    options = ", ".join(f"{name}={content[name]}" for name in SEARCHED)
    error = content["standard_error"]
    return f"{trial.metric} {trial.value:.5g}" + (f" ± {error:.2g}" if error else "") + f" with {options}"


def _write(options: EvaluateOptions, confirmed: list[Trial]) -> str:
    """The best combination, with the figures behind it as comments."""
    best = confirmed[0]
    lines = [
        f"# Best of a search on {best.record.content['checkpoint']} (step {best.record.step}).",
        *(f"# {_line(trial)}  {trial.record.id}" for trial in confirmed),
    ]
    chosen = {name: value for name, value in to_dict(best.sampling).items() if name in SEARCHED}
    text = "\n".join(lines) + "\n" + yaml.safe_dump({"sampling": chosen}, sort_keys=False)
    name = canonical_hash([trial.record.id for trial in confirmed])[:12]
    path = storage.join(options.evaluation.path, "sweeps", f"sampling-{name}.yaml")
    storage.replace(path, text.encode())
    return path
