"""From artefacts to the report page: gathers what the page shows and writes it."""

import datetime
import os
from collections.abc import Mapping
from typing import Any

from cluster import checkpoints, run_log
from cluster.tokenizer_options import training_path
from evaluation.evaluate import EvaluateOptions
from evaluation.records import Record, list_records
from evaluation.report import Curve, Grid, ReportData, render_report
from pipeline import storage
from stages.config import to_yaml

GRID_CAPTIONS = {
    "samples": "Samples",
    "real": "Held-out real images",
    "reconstructions": "The same images after the tokenizer",
}


def write_report(
    options: EvaluateOptions, page_path: str, title: str, wall_seconds: Mapping[str, float] | None = None
) -> None:
    """Renders the page of an evaluation folder to `page_path`.

    Args:
        options: whose run, tokenizer and evaluation folder are shown.
        page_path: the HTML file; replaced if it exists.
        title: heading of the page.
        wall_seconds: seconds per part, where known.
    """
    records = list_records(options.evaluation.path)
    commit = checkpoints.latest_commit(options.run.path)
    data = ReportData(
        title=title,
        created_at=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        summary=_summary(options, records, commit),
        config_yaml=to_yaml(options),
        records=[_row(record, page_path) for record in records],
        curves=_tokenizer_curves(options) + _run_curves(options, commit),
        grids=_grids(options, records),
        wall_seconds=wall_seconds or {},
    )
    storage.replace(page_path, render_report(data).encode())


def _summary(options: EvaluateOptions, records: list[Record], commit: checkpoints.Commit | None) -> dict[str, str]:
    summary = {"Source": options.source.name}
    if commit is not None:
        summary["Step"] = f"{commit.step:,}"
        if commit.train_loss is not None:
            summary["Training loss"] = f"{commit.train_loss:.3f} nats per code"
    if records:
        metrics = records[-1].metrics
        for name, label in (("gfd", "Distance of samples"), ("validation_nll", "Validation NLL, nats per code")):
            if name in metrics:
                summary[label] = f"{metrics[name]['value']:.3f}"
    return summary


def _row(record: Record, page_path: str) -> dict[str, Any]:
    folder = os.path.dirname(page_path)
    is_below = record.path.startswith(folder + "/")
    return {**record.content, **({"path": record.path[len(folder) + 1 :]} if is_below else {})}


def _tokenizer_curves(options: EvaluateOptions) -> list[Curve]:
    path = training_path(options.tokenizer.path)
    commit = checkpoints.newest_commit(path)
    if commit is None:
        return []
    batch = commit.content["sampler"]["global_batch_size"]
    records = run_log.read_log(path, commit.content["log"])

    def curve(title: str, name: str) -> Curve:
        lines = [record for record in records if name in record]
        seen = [(line["step"] + 1) * batch for line in lines]
        return Curve(f"Tokenizer: {title}", "images seen", seen, [line[name] for line in lines])

    return [curve("reconstruction loss", "loss"), curve("codebook perplexity", "codebook_perplexity")]


def _run_curves(options: EvaluateOptions, commit: checkpoints.Commit | None) -> list[Curve]:
    if commit is None:
        return []
    log = run_log.read_log(options.run.path, commit.content["log"])
    return [
        Curve(
            "Transformer: training loss",
            "step",
            [r["step"] + 1 for r in log],
            [r["loss"] for r in log],
            "nats per code",
        )
    ]


def _grids(options: EvaluateOptions, records: list[Record]) -> list[Grid]:
    if not records:
        return []
    latest = records[-1]
    return [
        Grid(
            caption=f"{GRID_CAPTIONS[name]}, step {latest.step:,}" if name == "samples" else GRID_CAPTIONS[name],
            png=storage.read_bytes(storage.join(options.evaluation.path, latest.grids[name])),
            alt=f"Grid of {GRID_CAPTIONS[name].lower()}",
        )
        for name in GRID_CAPTIONS
        if name in latest.grids
    ]
