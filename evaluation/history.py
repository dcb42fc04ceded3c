"""From artefacts to the report page: gathers what the page shows and writes it."""

import datetime
import os
from collections.abc import Mapping, Sequence

from cluster import checkpoints, run_log
from cluster.tokenizer_options import training_path
from evaluation.compare import find_regressions, group_series
from evaluation.describe import TOKENIZER, recorded_sampling
from evaluation.evaluate import EvaluateOptions
from evaluation.labels import metric_label, run_name
from evaluation.records import Record, list_records, write_rows
from evaluation.report import Curve, ReportData, render_report
from evaluation.viewer import gather_pictures
from pipeline import storage
from stages.config import to_yaml
from stages.options import NightlyOptions


def write_report(
    options: EvaluateOptions,
    page_path: str,
    title: str,
    wall_seconds: Mapping[str, float] | None = None,
    threshold: float = NightlyOptions().regression_threshold,
) -> None:
    """Renders the page of an evaluation folder to `page_path`, and completes its table of history.

    Args:
        options: whose run, tokenizer and evaluation folder are shown.
        page_path: the HTML file; replaced if it exists.
        title: heading of the page.
        wall_seconds: seconds per part, where known.
        threshold: see `find_regressions`.
    """
    records = list_records(options.evaluation.path)
    write_rows(options.evaluation.path, records)
    links = _links(records, page_path)
    commit = checkpoints.newest_commit(options.run.path)
    headline = choose_headline(records, options, commit)
    data = ReportData(
        title=title,
        created_at=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        summary=_summary(options, headline, commit),
        headline=headline,
        config_yaml=to_yaml(options),
        records=records,
        links=links,
        regressions=[found for series in group_series(records) for found in find_regressions(series, threshold)],
        pictures=gather_pictures(
            records,
            read=lambda path: storage.read_bytes(storage.join(options.evaluation.path, path)),
            link=lambda record: links.get(record.id),
            headline=headline,
        ),
        curves=_tokenizer_curves(options) + _run_curves(options, commit),
        wall_seconds=wall_seconds or {},
    )
    storage.replace(page_path, render_report(data).encode())


def choose_headline(records: Sequence[Record], options: EvaluateOptions, commit: checkpoints.Commit | None) -> Record | None:
    """The record whose numbers head the page: by preference of the run's newest commit, then of this run, then sampled as configured,
    then the newest. A night may measure another checkpoint or run last, and a search other options. Tokenizers head no page of a run."""

    def rank(record: Record) -> tuple[bool, bool, bool, str]:
        is_ours = record.run == options.run.path
        is_newest = is_ours and commit is not None and record.step == commit.step
        return is_newest, is_ours, record.content["sampling"] == recorded_sampling(options.draws()), record.created_at

    return max((record for record in records if commit is None or record.content.get("subject") != TOKENIZER), key=rank, default=None)


def _summary(options: EvaluateOptions, headline: Record | None, commit: checkpoints.Commit | None) -> dict[str, str]:
    """Numbers of one checkpoint: the one measured, or the newest where none is."""
    summary, shown = {"Source": options.source.name}, headline or commit
    if headline is not None:
        summary["Run"] = run_name(headline.run)
    if shown is not None:
        summary["Step"] = f"{shown.step:,}"
    if commit is not None and shown is not None and commit.step == shown.step and commit.train_loss is not None:
        summary["Training loss"] = f"{commit.train_loss:.3f} nats per code"
    for name in ("gfid", "gfd", "validation_nll"):
        if headline is not None and name in headline.metrics:
            summary[metric_label(name)] = f"{headline.metrics[name]['value']:.3f}"
    return summary


def _links(records: list[Record], page_path: str) -> dict[str, str]:
    folder = os.path.dirname(page_path) + "/"
    return {record.id: record.path.removeprefix(folder) for record in records if record.path.startswith(folder)}


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
