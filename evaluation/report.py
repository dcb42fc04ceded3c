"""The report: one static page per store that needs no network and no other file. Without its script it shows everything,
with it one steps through nights and classes."""

import base64
import datetime
import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from evaluation.charts import Bar, Series, bar_chart, line_chart, thin
from evaluation.compare import Regression, standard_errors_text
from evaluation.labels import metric_label, run_name, sampling_text
from evaluation.records import Record
from evaluation.trends import trend_groups
from evaluation.viewer import Pictures
from stages.errors import ConfigError

FOLDER = os.path.dirname(os.path.abspath(__file__))
MAX_CURVE_POINTS = 240
PLUS_MINUS = "\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}"
LOG_SCALE_FROM = 20.0  # a loss that falls by more than this factor is drawn on a logarithmic axis

# The three distances are measured the same way; the first is the least that can be hoped for.
HOLDOUT, RECONSTRUCTIONS, SAMPLES = ("fd_holdout", "fid_holdout"), ("rfd", "rfid"), ("gfd", "gfid")
DISTANCES = (("Held-out real images (floor)", HOLDOUT), ("Reconstructions", RECONSTRUCTIONS), ("Samples", SAMPLES))


@dataclass(frozen=True)
class Curve:
    """A number logged over time. `x` and `y` have the same length; `unit` is that of y."""

    name: str
    x_label: str
    x: Sequence[float]
    y: Sequence[float]
    unit: str = ""


@dataclass(frozen=True, kw_only=True)
class ReportData:
    """What the page shows; nothing on it comes from elsewhere.

    Attributes:
        title: heading of the page.
        created_at: when the page was made, as text.
        summary: the few numbers that matter, label to text, in order.
        config_yaml: the resolved configuration.
        records: evaluation records, oldest first.
        headline: the one whose numbers head the page; the newest if not given.
        links: by record id, the record's file relative to the page.
        regressions: what got worse.
        pictures: samples over time, real images, reconstructions.
        curves: losses of both stages.
        wall_seconds: how long each part took, in order.
    """

    title: str
    created_at: str
    summary: Mapping[str, str] = field(default_factory=dict)
    config_yaml: str = ""
    records: Sequence[Record] = ()
    headline: Record | None = None
    links: Mapping[str, str] = field(default_factory=dict)
    regressions: Sequence[Regression] = ()
    pictures: Pictures = Pictures()
    curves: Sequence[Curve] = ()
    wall_seconds: Mapping[str, float] = field(default_factory=dict)


def render_report(data: ReportData) -> str:
    """The page as HTML text.

    Raises:
        ConfigError: jinja2 is not installed.
    """
    headline = data.headline or (data.records[-1] if data.records else None)
    content = headline.content if headline else None
    script, style = _asset("report.js"), _asset("report.css")
    return _template().render(
        data=data,
        style=style,
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        headline=content,
        distances=_distance_rows(content) if content else [],
        distance_bars=_distance_bars(content) if content else "",
        measurements=_other_rows(content) if content else [],
        regressions=[_regression_row(regression, data.links) for regression in data.regressions],
        curves=[_curve_chart(curve) for curve in data.curves],
        trends=trend_groups(data.records),
        table=_record_table(data.records, data.links),
        seconds=[(name, format_seconds(value)) for name, value in data.wall_seconds.items()],
        total_seconds=format_seconds(sum(data.wall_seconds.values())),
    )


def format_value(value: float, standard_error: float | None = None) -> str:
    """A number as people write it: with an error, both to the error's second digit (`12.34 ± 0.56`); else four digits.

    The blanks around ± do not break.
    """
    if not math.isfinite(value):
        return str(value)
    if standard_error is not None and math.isfinite(standard_error) and standard_error > 0:
        decimals = min(max(0, 1 - math.floor(math.log10(standard_error))), 8)
        return f"{value:,.{decimals}f}{PLUS_MINUS}{standard_error:,.{decimals}f}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def format_seconds(seconds: float) -> str:
    """A duration: `8.1 s`, `2 min 05 s` or `1 h 02 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def format_time(text: str) -> str:
    """An ISO time with its zone as `2026-03-07 02:14 UTC`; any other text as it is."""
    try:
        time = datetime.datetime.fromisoformat(text)
    except ValueError:
        return text
    return text if time.tzinfo is None else time.astimezone(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")


def _asset(name: str) -> str:
    with open(os.path.join(FOLDER, name), encoding="utf-8") as file:
        return file.read()


def _template() -> Any:
    try:
        import jinja2
    except ImportError:
        raise ConfigError(
            "jinja2 is not installed, but the report page needs it. Run pip install 'tessera[demo]'."
        ) from None
    loader = jinja2.FileSystemLoader(FOLDER)
    # Charts are marked as HTML one by one; all else is escaped.
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["time"] = format_time
    environment.undefined = jinja2.StrictUndefined
    return environment.get_template("report.html.j2")


def _metric(record: Mapping[str, Any], names: Sequence[str]) -> Mapping[str, Any] | None:
    """The first of these that was measured; of both Fréchet distances the one that `distance` names."""
    is_fid = str(record.get("distance")).startswith("FID")
    ordered = sorted(names, key=lambda name: ("fid" in name) != is_fid)
    return next((record["metrics"][name] for name in ordered if name in record["metrics"]), None)


def _text(metric: Mapping[str, Any]) -> str:
    return format_value(metric["value"], metric.get("standard_error"))


def _distance_rows(record: Mapping[str, Any]) -> list[dict[str, str]]:
    rows = []
    for label, names in DISTANCES:
        metric = _metric(record, names)
        if metric is not None:
            corrected = metric.get("bias_corrected")
            # To the digits of the value, so that the two can be compared at a glance.
            text = (
                format_value(corrected, metric.get("standard_error")).split(PLUS_MINUS)[0]
                if corrected is not None
                else "–"
            )
            rows.append(
                {"label": label, "value": _text(metric), "corrected": text, "num_samples": f"{metric['num_samples']:,}"}
            )
    return rows


def _distance_bars(record: Mapping[str, Any]) -> str:
    found = [(i, label, _metric(record, names)) for i, (label, names) in enumerate(DISTANCES)]
    bars = [Bar(label, m["value"], m.get("standard_error"), _text(m), i) for i, label, m in found if m]
    return bar_chart(bars, title="; ".join(f"{bar.label}: {bar.text}" for bar in bars))


def _other_rows(record: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    known = {name for _, names in DISTANCES for name in names}
    others = [(name, metric) for name, metric in record["metrics"].items() if name not in known]
    return [(metric_label(name), _text(metric), f"{metric['num_samples']:,}") for name, metric in others]


def _curve_chart(curve: Curve) -> dict[str, str]:
    x, y, k = thin(curve.x, curve.y, MAX_CURVE_POINTS)
    finite = [v for v in y if math.isfinite(v)]
    log = bool(finite) and min(finite) > 0 and finite[0] > LOG_SCALE_FROM * min(finite)
    unit = f", {curve.unit}" if curve.unit else ""
    title = (
        f"{curve.name}{unit}, from {format_value(y[0])} to {format_value(y[-1])}" if y else f"{curve.name}: no values"
    )
    notes = [f"last value {format_value(curve.y[-1])}"] if len(curve.y) else ["nothing logged"]
    notes += ["logarithmic scale"] if log else []
    notes += [f"each point the mean of {k} logged values"] if k > 1 else []
    chart = line_chart([Series("", x, y, colour=1)], title=title, x_label=curve.x_label, log_y=log)
    return {"name": curve.name + unit, "svg": chart, "note": "; ".join(notes)}


def _regression_row(regression: Regression, links: Mapping[str, str]) -> dict[str, Any]:
    difference, record, best = regression.difference, regression.record, regression.best
    return {
        "label": metric_label(difference.metric),
        "run": run_name(record.run),
        "step": record.step,
        "value": _text(record.metrics[difference.metric]),
        "link": links.get(record.id),
        "best_step": best.step,
        "best_value": _text(best.metrics[difference.metric]),
        "best_link": links.get(best.id),
        "worse_by": standard_errors_text(difference.worse_by or 0.0),
    }


def _record_table(records: Sequence[Record], links: Mapping[str, str]) -> dict[str, Any]:
    """All records, newest first; one column per metric that occurs, what matters most on the left."""
    present = [name for record in records for name in record.metrics]
    names = list(dict.fromkeys([*(n for n in (*SAMPLES, *RECONSTRUCTIONS, *HOLDOUT) if n in present), *present]))
    rows = []
    for record in reversed(records):
        cells = [_text(record.metrics[name]) if name in record.metrics else "–" for name in names]
        samples = _metric(record.content, SAMPLES)
        rows.append(
            {
                "content": record.content,
                "link": links.get(record.id),
                "run": run_name(record.run),
                "sampling": sampling_text(record.content["sampling"]),
                "cells": cells,
                "num_samples": f"{samples['num_samples']:,}" if samples else "–",
            }
        )
    return {"heads": [metric_label(name) for name in names], "rows": rows}
