"""The nightly job: evaluates the run's newest commit if it has no record yet, and renders the page."""

import dataclasses
import logging
from typing import Any

from cluster import checkpoints
from evaluation.evaluate import EvaluateOptions, evaluate
from evaluation.history import write_report
from pipeline import storage

logger = logging.getLogger(__name__)

PAGE = "report.html"


def nightly(options: EvaluateOptions) -> dict[str, Any]:
    """Evaluates the newest commit and writes `report.html` into the evaluation folder. Ray must be connected.

    A record is named by what decides its numbers, and the first one of a name stays: running twice, also at once, leaves one record.

    Raises:
        ArtefactError: the run has no committed checkpoint.
    """
    commit = checkpoints.resolve_checkpoint("latest", options.run.path)
    record = evaluate(dataclasses.replace(options, checkpoint=commit.path))
    page = storage.join(options.evaluation.path, PAGE)
    write_report(options, page, f"Evaluation of {options.run.path}")
    return {**record.to_summary(), "page": page}
