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

from evaluation.compare import direction
from evaluation.evaluate import EvaluateOptions, evaluate, prepare
from evaluation.hashing import canonical_hash
from evaluation.metrics import plan_metrics
from evaluation.records import Record
from evaluation.set_metric import SAMPLES
from pipeline import storage
from stages.config import to_dict
from stages.errors import ConfigError
from stages.options import EvaluationOptions, SamplingOptions, SweepOptions

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
        ConfigError: nothing to search, too many combinations, too few samples, or a metric that says nothing. Else like `evaluate`.
    """
    found = list(combinations(options.sampling, settings))
    check_sweep(found, settings, options.evaluation)
    metric = deciding_metric(settings, options.evaluation)
    # The last part of the work is checked before the first. One checkpoint throughout: a training beside this may publish others.
    options = dataclasses.replace(options, checkpoint=prepare(options).assignment.checkpoint_path)
    few = dataclasses.replace(options.evaluation, num_samples=settings.num_samples)
    trials = []
    for number, sampling in enumerate(found, 1):
        trials.append(_try(dataclasses.replace(options, evaluation=few), sampling, metric))
        logger.info("Combination %d of %d: %s", number, len(found), _line(trials[-1]))
    ranked = _best_first(trials)
    chosen = [trial.sampling for trial in ranked[: settings.num_confirmed]]
    if options.sampling not in chosen:
        chosen.append(options.sampling)
    seed = options.draws().seed + 1
    many = dataclasses.replace(options, seed=seed)
    confirmed = _best_first([_try(many, sampling, metric) for sampling in chosen])
    for trial in confirmed:
        logger.info("Confirmed: %s", _line(trial))
    return {
        "metric": metric,
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


def check_sweep(found: list[SamplingOptions], settings: SweepOptions, evaluation: EvaluationOptions) -> None:
    """Refuses a search without alternatives, one that is too long, and one on too few samples for error bars."""
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
    least = 2 * evaluation.num_blocks
    if settings.num_samples < least:
        raise ConfigError(
            f"sweep.num_samples is {settings.num_samples}, but the error bars need two per block of evaluation.num_blocks "
            f"({evaluation.num_blocks}). Raise it to {least}."
        )


def deciding_metric(settings: SweepOptions, evaluation: EvaluationOptions) -> str:
    """The value of a record that ranks the combinations: `sweep.metric`, or the distance of the samples.

    Raises:
        ConfigError: it is not measured, does not depend on how samples are drawn, or neither higher nor lower is better.
    """
    able = [name for name in plan_metrics(evaluation).values_of(SAMPLES) if direction(name)]
    metric = settings.metric or next((name for name in ("gfid", "gfd") if name in able), None)
    if metric not in able:
        raise ConfigError(
            f"sweep.metric is {metric or 'not set'}, but of what evaluation.metrics names, samples are better or worse by "
            f"{', '.join(able) or 'nothing'}. Choose one of these, or add e.g. fd to evaluation.metrics."
        )
    return metric


def _try(options: EvaluateOptions, sampling: SamplingOptions, metric: str) -> Trial:
    return Trial(sampling, evaluate(dataclasses.replace(options, sampling=sampling)), metric)


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
