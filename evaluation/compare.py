"""Which records may be compared, and whether the newer one is worse.

Two values of a metric mean the same only if everything but the thing measured was the same: number of images, extractor,
resize, reference, held-out images. Records that differ there are refused, never compared with a footnote. What only one of them has
measured does not matter.
"""

import logging
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from evaluation.evaluate import EvaluateOptions, evaluate, prepare
from evaluation.records import Record, read_record
from evaluation.significance import threshold_among
from stages.config import to_dict
from stages.errors import ArtefactError

logger = logging.getLogger(__name__)

# What is measured. All else in a record's identity is how it is measured, and must agree.
SUBJECT = frozenset(
    {
        "checkpoint_hash",
        "tokenizer_fingerprint",
        "code_dataset_root_hash",
        "training_codes_root_hash",
        "sampling",
        "seed",
        "metrics",
    }
)
# What of the identity is of single metrics only; `protocols` in a record says it for each.
PER_METRIC = frozenset({"extractor_fingerprints", "reference_keys", "num_pairwise_images", "lpips_fingerprint"})
MAIN = ("distance", "extractor_resize", "extractor_fingerprint", "reference_key")  # of the extractor that names the record
DISTANCES = ("fd", "fid", "sfid", "kd", "kid", "cmmd")  # with g in front of samples, r of reconstructions
LOWER_IS_BETTER = {*(prefix + name for name in DISTANCES for prefix in ("", "g", "r")), "validation_nll", "lpips"}
HIGHER_IS_BETTER = {"inception_score", "precision", "recall", "density", "coverage", "psnr", "ssim", "pixel_accuracy", "mean_iou"}
CERTAIN = 1e6  # standard errors by which a value changed whose error bars are zero; finite, so that JSON holds it


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One metric in two records.

    Attributes:
        metric: its name.
        before, after: the values.
        standard_error: of their difference, block by block where both are means over the same images, else as of independent
            measurements; None where one of them has no error bar.
        degrees_of_freedom: of that error, which is known from the blocks of images; None without it.
        worse_by: standard errors by which `after` is worse, negative if it is better, `CERTAIN` where both error bars are
            zero; None without an error bar or where neither direction is better.
    """

    metric: str
    before: float
    after: float
    standard_error: float | None
    degrees_of_freedom: int | None
    worse_by: float | None


@dataclass(frozen=True, kw_only=True)
class Regression:
    """A metric of a record that is worse than the best earlier value of its series."""

    difference: Difference
    record: Record
    best: Record

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for summaries and hooks."""
        return {
            **to_dict(self.difference),
            "run": self.record.run,
            "step": self.record.step,
            "record": self.record.path,
            "best_step": self.best.step,
            "best_record": self.best.path,
        }


def protocol(content: Mapping[str, Any]) -> dict[str, Any]:
    """How the numbers of a record's content were measured: what must agree for them to be compared with others, besides what
    `protocols` says of each metric. Records from before there was that have everything here."""
    apart, main = (SUBJECT | PER_METRIC, MAIN) if "protocols" in content else (SUBJECT, MAIN[:2])
    identity = {name: value for name, value in content["identity"].items() if name not in apart}
    return identity | {name: content.get(name) for name in main}


def _metric_protocols(content: Mapping[str, Any]) -> dict[str, Any]:
    return content.get("protocols", {})


def _differing(first: Mapping[str, Any], second: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    pairs = [(name, first.get(name), second.get(name)) for name in sorted(names)]
    return [f"{name} is {there} there and {here} here" for name, there, here in pairs if there != here]


def check_comparable(path: str, content: Mapping[str, Any], other_path: str, other: Mapping[str, Any]) -> None:
    """Refuses two records that were not measured alike.

    Args:
        path, other_path: what to call them.
        content, other: what they say.

    Raises:
        ArtefactError: naming both records and both values of everything in which they differ.
    """
    first, second = protocol(content), protocol(other)
    differing = _differing(first, second, {*first, *second})
    first, second = _metric_protocols(content), _metric_protocols(other)
    differing += _differing(first, second, first.keys() & second.keys())
    if differing:
        raise ArtefactError(
            f"{path} is to be compared with {other_path}, but they were measured differently: {'; '.join(differing)}. "
            "Measure one of them again, the way the other was."
        )


def compare(before: Record, after: Record) -> list[Difference]:
    """Every metric that both records have, of as many images; others of both are named in the log.

    Raises:
        ArtefactError: they were not measured alike.
    """
    check_comparable(before.path, before.content, after.path, after.content)
    found = _differences(before, after)
    _warn_of_left_out(after, (before.metrics.keys() & after.metrics.keys()) - {each.metric for each in found})
    return found


def _differences(before: Record, after: Record) -> list[Difference]:
    """Every metric that both records have, measured alike on as many images."""
    first, second = _metric_protocols(before.content), _metric_protocols(after.content)
    return [
        _difference(name, before.metrics[name], after.metrics[name], after.content["identity"]["num_blocks"])
        for name in after.metrics
        if name in before.metrics
        and first.get(name) == second.get(name)
        and before.metrics[name]["num_samples"] == after.metrics[name]["num_samples"]
    ]


def _warn_of_left_out(record: Record, metrics: Collection[str]) -> None:
    if metrics:
        logger.warning(
            "%s of %s is not compared: earlier values are of another number of images, or measured otherwise.",
            ", ".join(sorted(metrics)),
            record.path,
        )


def direction(metric: str) -> int:
    """1 where a higher value is worse, -1 where it is better, 0 where neither holds or is known.

    What follows the name after `_` says which images and which extractor.
    """

    def is_one_of(names: set[str]) -> bool:
        return any(metric == name or metric.startswith(name + "_") for name in names)

    return int(is_one_of(LOWER_IS_BETTER)) - int(is_one_of(HIGHER_IS_BETTER))


def _difference(metric: str, before: dict[str, Any], after: dict[str, Any], num_blocks: int) -> Difference:
    error, degrees_of_freedom = _error_of_difference(before, after, num_blocks)
    return Difference(
        metric=metric,
        before=before["value"],
        after=after["value"],
        standard_error=error,
        degrees_of_freedom=degrees_of_freedom,
        worse_by=_worse_by(direction(metric), before["value"], after["value"], error),
    )


def _error_of_difference(before: dict[str, Any], after: dict[str, Any], num_blocks: int) -> tuple[float | None, int | None]:
    """Standard error of after - before, and its degrees of freedom. What is hard for one model is hard for another, so that means over
    the same images differ by far less than either varies."""
    errors = (before["standard_error"], after["standard_error"])
    if None in errors:
        return None, None
    first, second = (np.asarray(each.get("block_means", ())) for each in (before, after))
    if len(first) != num_blocks or len(second) != num_blocks:
        return math.hypot(*errors), 2 * (num_blocks - 1)
    changes = second - first
    return float(np.std(changes, ddof=1) / math.sqrt(len(changes))), len(changes) - 1


def _worse_by(sign: int, before: float, after: float, error: float | None) -> float | None:
    """See `Difference`; `sign` is from `direction`, `error` that of the difference."""
    if error is None or not sign:
        return None
    if math.isclose(before, after, rel_tol=1e-6):  # another machine rounds otherwise, however small the error bar
        return 0.0
    return max(-CERTAIN, min(sign * (after - before) / error, CERTAIN)) if error else math.copysign(CERTAIN, sign * (after - before))


def series_of(record: Record) -> str:
    """Names what a record is one point of: a run, sampled and measured in one way."""
    content = record.content
    return repr((record.run, sorted(content["sampling"].items()), sorted(protocol(content).items())))


def group_series(records: Iterable[Record]) -> list[list[Record]]:
    """Records by series, each in order of step (then of time), the series with the newest record last."""
    groups: dict[str, list[Record]] = {}
    for record in sorted(records, key=lambda record: (record.created_at, record.id)):
        name = series_of(record)
        groups[name] = [*groups.pop(name, []), record]
    return [sorted(group, key=lambda record: (record.step, record.created_at)) for group in groups.values()]


def find_regressions(series: Sequence[Record], threshold: float) -> list[Regression]:
    """Metrics that are worse than the best of earlier steps, the worst first: of the highest step of a series, and of the newest
    record, which is of a lower step after a training went back.

    Args:
        series: records measured alike, in order of step.
        threshold: standard errors of the difference from which on it counts, where there is one earlier step. See
            `evaluation.significance.threshold_among`.
    """
    found = [regression for record in to_judge(series) for regression in regressions_of(record, series, threshold)]
    return sorted(found, key=lambda regression: -(regression.difference.worse_by or 0.0))


def to_judge(series: Sequence[Record], judged: Collection[str] = ()) -> list[Record]:
    """The records of a series that say how its training stands, and those of higher steps and later times than all in `judged` (ids)."""
    newest = max(series, key=lambda record: record.created_at)
    known = [record for record in series if record.id in judged] or [series[-1], newest]
    last, step = max(record.created_at for record in known), max(record.step for record in known)
    return [record for record in series if record in (series[-1], newest) or (record.created_at > last and record.step > step)]


def standard_errors_text(worse_by: float) -> str:
    """`12.3 standard errors`, or what stands for that where there is no error at all."""
    return f"{worse_by:,.1f} standard errors" if abs(worse_by) < CERTAIN else "without any error"


def regressions_of(record: Record, series: Sequence[Record], threshold: float) -> list[Regression]:
    """The metrics of one record that are worse than the best of earlier steps; else like `find_regressions`."""
    earlier = [other for other in series if other.step < record.step]
    worst: dict[str, Regression] = {}
    compared: set[str] = set()
    for best in earlier:
        for found in _differences(best, record):
            compared.add(found.metric)
            if found.worse_by is None or found.degrees_of_freedom is None:
                continue
            if found.worse_by <= threshold_among(len(earlier), threshold, found.degrees_of_freedom):
                continue
            known = worst.get(found.metric)
            if known is None or direction(found.metric) * (found.before - known.difference.before) < 0:
                worst[found.metric] = Regression(difference=found, record=record, best=best)
    _warn_of_left_out(record, {name for other in earlier for name in other.metrics.keys() & record.metrics.keys()} - compared)
    return list(worst.values())


def evaluate_and_compare(options: EvaluateOptions, other_path: str) -> dict[str, Any]:
    """Measures a checkpoint and compares it with an earlier record. Ray must be connected.

    Returns:
        The new record's summary, with `compared_with` and `differences`.

    Raises:
        ArtefactError: the record was measured otherwise; said before anything is measured. Else like `evaluate`.
    """
    other, preparation = read_record(other_path), prepare(options)
    planned = {**preparation.description, "identity": preparation.identity}
    check_comparable(other.path, other.content, "this evaluation", planned)
    record = evaluate(options, preparation=preparation)
    differences = compare(other, record)
    for found in differences:
        error = f" ± {found.standard_error:.3g}" if found.standard_error else ""
        print(f"{found.metric:<28} {found.before:12.6g} → {found.after:12.6g}   {found.after - found.before:+.4g}{error}")
    return {
        **record.to_summary(),
        "compared_with": other.path,
        "differences": [to_dict(found) for found in differences],
    }
