"""The demo: every part of Tessera once, small, from images to a report page."""

import json
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from cluster.sample_job import SampleJobOptions, sample
from cluster.tokenizer_job import train_tokenizer
from cluster.tokenizer_options import TokenizerJobOptions
from cluster.train_job import train
from cluster.train_options import TrainJobOptions
from evaluation.evaluate import EvaluateOptions, evaluate
from evaluation.history import write_report
from pipeline import storage
from pipeline.sources import SOURCES
from pipeline.tokenize_images import TokenizeOptions, tokenize
from stages.config import load_config, select_sections
from stages.options import Config

logger = logging.getLogger(__name__)

DEMO_OBJECT_STORE_BYTES = 512 << 20
CONFIG = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "configs", "demo.yaml")


def demo_config(output: str, source: str) -> Config:
    """configs/demo.yaml with every path under `output` and the source chosen on the command line."""
    paths = ["run", "tokenizer", "codes", "samples", "evaluation"]
    sections = ["run", "tokenizer", "codes", "sampling", "evaluation"]
    overrides = [f"{section}.path={storage.join(output, name)}" for section, name in zip(sections, paths)]
    if source == "fashion-mnist":
        overrides += ["source.name=fashion-mnist", "images.size=28", "images.channels=1"]
    elif source in SOURCES:
        overrides += [f"source.name={source}"]
    else:
        overrides += [
            "source.name=image-folder",
            f"source.path={storage.absolute(source)}",
            "source.holdout_fraction=0.1",
        ]
    return load_config(CONFIG, overrides)


def demo(output: str, source: str) -> dict[str, Any]:
    """Trains a tokenizer and a transformer, samples, evaluates and reports, all under `output`. Ray must be connected.

    Finished parts are taken as they are, so a demo that was stopped goes on where it was.

    Returns:
        What summary.json holds: the artefacts, the measured values and the seconds each part took.
    """
    config = demo_config(output, source)
    seconds: dict[str, float] = {}
    with _timed("train-tokenizer", seconds):
        tokenizer = train_tokenizer(select_sections(TokenizerJobOptions, config))
    with _timed("tokenize", seconds):
        codes = tokenize(select_sections(TokenizeOptions, config))
    with _timed("train", seconds):
        run = train(select_sections(TrainJobOptions, config))
    with _timed("sample", seconds):
        samples = sample(select_sections(SampleJobOptions, config, checkpoint=run.checkpoint))
    with _timed("evaluate", seconds):
        evaluation_options = select_sections(EvaluateOptions, config, checkpoint=run.checkpoint)
        record = evaluate(evaluation_options)
    with _timed("report", seconds):
        storage.replace(
            storage.join(output, "samples.png"), storage.read_bytes(storage.join(samples.samples, "grid.png"))
        )
        report = storage.join(output, "report.html")
        write_report(evaluation_options, report, f"Tessera demo: {config.source.name}", wall_seconds=seconds)
    summary = {
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "code_dataset": codes.dataset,
        "code_dataset_root_hash": codes.root_hash,
        "num_rows": codes.num_rows,
        "bytes_per_row": codes.bytes_per_row,
        "checkpoint": run.checkpoint,
        "samples": samples.samples,
        "evaluation": [
            {"metric": name, "value": metric["value"], "num_samples": metric["num_samples"]}
            for name, metric in record.metrics.items()
        ],
        "wall_seconds": seconds,
    }
    storage.replace(storage.join(output, "summary.json"), json.dumps(summary, indent=2).encode())
    _print_result(record.metrics, report)
    return summary


@contextmanager
def _timed(name: str, seconds: dict[str, float]) -> Iterator[None]:
    logger.info("== %s", name)
    started = time.monotonic()
    yield
    seconds[name] = round(time.monotonic() - started, 2)
    logger.info("== %s took %.0f s", name, seconds[name])


def _print_result(metrics: dict[str, Any], report: str) -> None:
    print("\nFréchet distance to the reference, lower is better, all measured the same way:")
    for label, name in (("held-out real images (floor)", "fd_holdout"), ("reconstructions", "rfd"), ("samples", "gfd")):
        metric = metrics[name]
        print(
            f"  {label:<30} {metric['value']:8.2f} ± {metric['standard_error']:.2f}  ({metric['num_samples']} images)"
        )
    print(f"\nReport: {report}")
