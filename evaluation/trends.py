"""Every metric over steps and over nights, one chart each, a line per series."""

import datetime
from collections.abc import Mapping, Sequence
from typing import Any

from evaluation.charts import Series, line_chart
from evaluation.compare import group_series, protocol
from evaluation.labels import ORDER, metric_label, run_name, sampling_text
from evaluation.records import Record

NUM_COLOURS = 6
UNITS = (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0))


def trend_groups(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Charts of all records, those measured alike together; the group with the newest record first.

    Returns:
        Per group: `name` (how it was measured), `num_records`, `num_left_out` (series beyond the colours), and
        `charts`: label, and the chart over steps and over time as <svg>.
    """
    groups: dict[str, list[list[Record]]] = {}
    for series in group_series(records):
        name = repr(sorted(protocol(series[-1].content).items()))
        groups[name] = [*groups.pop(name, []), series]
    return [_group(series) for series in reversed(groups.values())]


def _group(all_series: list[list[Record]]) -> dict[str, Any]:
    drawn = list(reversed(all_series))[:NUM_COLOURS]
    names = series_names(drawn)
    present = {name for series in drawn for record in series for name in record.metrics}
    metrics = [name for name in ORDER if name in present] + sorted(present - set(ORDER))
    newest = drawn[0][-1]
    what = newest.content["distance"] or f"Reconstructions of {newest.content.get('input', 'images')}"
    return {
        "name": f"{what}, {newest.content['evaluation']['num_samples']:,} images",
        "num_records": sum(map(len, drawn)),
        "num_left_out": len(all_series) - len(drawn),
        "charts": [
            {
                "label": metric_label(metric),
                "steps": _chart(metric, drawn, names, over_time=False),
                "nights": _chart(metric, drawn, names, over_time=True),
            }
            for metric in metrics
        ],
    }


def series_names(all_series: Sequence[Sequence[Record]]) -> list[str]:
    """What tells these series apart: the run, the sampling options, or both, and the seed where these are not enough."""
    runs = [run_name(series[-1].run) for series in all_series]
    samplings = [sampling_text(series[-1].content["sampling"]) for series in all_series]
    parts = [values for values in (runs, samplings) if len(set(values)) > 1] or [runs]
    names = [", ".join(words) for words in zip(*parts)]
    seeds = [series[-1].content["seed"] for series in all_series]
    return [name if names.count(name) == 1 else f"{name}, seed {seed}" for name, seed in zip(names, seeds)]


def _chart(metric: str, all_series: Sequence[Sequence[Record]], names: Sequence[str], over_time: bool) -> str:
    times = [_seconds(record) for series in all_series for record in series]
    first, length = min(times), max(times) - min(times)
    unit, seconds = next((u for u in UNITS if length >= 2 * u[1]), UNITS[0])
    lines = []
    for colour, (series, name) in enumerate(zip(all_series, names)):
        found = [record for record in series if metric in record.metrics]
        if over_time:
            found.sort(key=lambda record: record.created_at)
        if found:
            x = [(_seconds(record) - first) / seconds if over_time else record.step for record in found]
            values: list[Mapping[str, Any]] = [record.metrics[metric] for record in found]
            y, errors = [value["value"] for value in values], [value["standard_error"] for value in values]
            lines.append(Series(name if len(all_series) > 1 else "", x, y, errors, colour=colour + 1))
    start = datetime.datetime.fromtimestamp(first, datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    label = f"{unit} since {start}" if over_time else "training step"
    title = f"{metric_label(metric)} over {'nights' if over_time else 'steps'}, {len(lines)} series"
    return line_chart(lines, title=title, x_label=label)


def _seconds(record: Record) -> float:
    return datetime.datetime.fromisoformat(record.created_at).timestamp()
