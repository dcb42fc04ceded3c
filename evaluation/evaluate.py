"""The `evaluate` job: one checkpoint, or one tokenizer alone, one record."""

import dataclasses
import datetime
import logging
import math
import platform
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayActorError, RayTaskError
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.runtime import user_errors
from evaluation.actor import Assignment, EvaluationActor, Measurement
from evaluation.describe import CHECKPOINT
from evaluation.prepare import EvaluateOptions, Preparation, prepare
from evaluation.records import Record, find_record, read_record, record_id, write_record
from evaluation.resources import bundle, reserved
from pipeline import storage
from pipeline.inputs import IMAGE
from stages import __version__
from stages.config import build, to_dict
from stages.errors import TesseraError
from stages.options import EvaluationOptions, SamplingOptions

logger = logging.getLogger(__name__)

TOLERANCE = 1e-6
MAX_COORDINATORS = 3
PACKAGES = ("torch", "numpy", "pillow", "ray")

# Called about once a second with the images finished so far by phase (sampling, reference, holdout) and the totals of
# all phases.
Progress = Callable[[dict[str, int], dict[str, int]], None]


def evaluate(
    options: EvaluateOptions, progress: Progress | None = None, preparation: Preparation | None = None
) -> Record:
    """Measures a checkpoint or tokenizer and stores the record, or returns that of the same evaluation if there is one.

    Ray must be connected.

    Args:
        options: what is measured, and how.
        progress: called while it is.
        preparation: of these options, where it was made before.

    Raises:
        ArtefactError: checkpoint, code dataset and tokenizer do not belong together, or one is missing or damaged.
        ConfigError: no such metric, extractor or source, no held-out images, or too few samples for the error bars.
        TesseraError: actors keep dying, images cannot be read, or the store lets two writers of one key both win.
    """
    begin = time.monotonic()
    preparation = preparation or prepare(options)
    identifier = record_id(preparation.identity)
    present = find_record(options.evaluation.path, identifier)
    if present is not None:
        logger.info("This evaluation has been made before: %s", present.path)
        return present
    storage.check_conditional_put(options.evaluation.path)
    measurement = measure(preparation.assignment, progress)
    _check_finite(measurement)
    references = {"/".join(key): stored.to_dict() for key, stored in measurement.references.items()}
    content = {
        "metrics": {name: estimate.to_dict() for name, estimate in measurement.metrics.items()},
        **preparation.description,
        "reference": next(iter(references.values()), {}),
        "references": references,
        "num_unusable_holdout": measurement.num_unusable,
        "layouts": measurement.layouts,
        "identity": preparation.identity,
        "versions": _versions(),
        "device": _device(options.evaluation),
        "created_at": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="milliseconds"),
        "wall_seconds": {
            name: round(s, 3) for name, s in {**measurement.wall_seconds, "total": time.monotonic() - begin}.items()
        },
    }
    return write_record(options.evaluation.path, identifier, content, measurement.grids)


def _check_finite(measurement: Measurement) -> None:
    for name, estimate in measurement.metrics.items():
        for part in ("value", "standard_error", "bias_corrected"):
            number = getattr(estimate, part)
            if number is not None and not math.isfinite(number):
                raise TesseraError(
                    f"{name} has the {part} {number}, but a record holds finite numbers. Look at the weights that were measured: a "
                    f"training that diverged gives such images."
                )


def _versions() -> dict[str, str]:
    return {"tessera": __version__, "python": platform.python_version()} | {name: version(name) for name in PACKAGES}


def _device(options: EvaluationOptions) -> str:
    """What the actors compute on, as far as Ray can tell: CPU, or GPU with the kinds that there are."""
    if not bundle(options).get("GPU"):
        return "CPU"
    prefix = "accelerator_type:"
    kinds = sorted(name.removeprefix(prefix) for name in ray.cluster_resources() if name.startswith(prefix))
    return " ".join(["GPU", *kinds])


def verify_record(record_path: str, options: EvaluateOptions, progress: Progress | None = None) -> list[str]:
    """Measures again what a record says and lists every number that differs by more than 1e-6 relative; empty when it
    stands.

    What decides the numbers is taken from the record; `options` say where things are and how many actors measure.

    Args:
        record_path: the record's file.
        options: its `checkpoint` may name a copy of the record's checkpoint.
        progress: see `evaluate`.

    Raises:
        ArtefactError: the record is missing or damaged; else like `evaluate`.
    """
    record = read_record(record_path)
    preparation = prepare(_options_of(record, options))
    found, expected = preparation.identity, record.content["identity"]
    if found != expected:
        names = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
        return [f"{name}: the record has {expected.get(name)}, here it is {found.get(name)}" for name in names]
    problems = differences(record, measure(preparation.assignment, progress))
    there, here = record.content.get("device"), _device(options.evaluation)
    if problems and there not in (None, here):
        problems.append(f"The record was measured on {there}, and here on {here}: they round otherwise, which may be all.")
    return problems


def differences(record: Record, measurement: Measurement) -> list[str]:
    """Numbers of a record that a new measurement does not confirm to 1e-6 relative."""
    again = {name: estimate.to_dict() for name, estimate in measurement.metrics.items()}
    problems = [f"{name}: in one of the two only" for name in sorted(again.keys() ^ record.metrics.keys())]
    for name in sorted(again.keys() & record.metrics.keys()):
        for key, expected in record.metrics[name].items():
            found = again[name].get(key)
            if expected != found and not (expected and found and np.allclose(found, expected, rtol=TOLERANCE, atol=0.0)):
                problems.append(f"{name} {key}: the record has {expected}, measured again it is {found}")
    return problems


def _options_of(record: Record, options: EvaluateOptions) -> EvaluateOptions:
    """`options` with everything that decides the numbers taken from the record."""
    content = record.content
    kept = {"path": options.sampling.path, "num_samples": options.sampling.num_samples}
    evaluation = {**to_dict(options.evaluation), **content["evaluation"]}
    if options.evaluation.reference_path is not None:  # where the file is now
        evaluation["reference_path"] = options.evaluation.reference_path
    checkpoint = content["checkpoint"] if options.checkpoint == "latest" else options.checkpoint
    tokenized = {"input": content.get("input", IMAGE), "num_labels": content.get("num_labels")}
    return dataclasses.replace(
        options,
        tokenizer=dataclasses.replace(options.tokenizer, **tokenized),
        sampling=build(SamplingOptions, {**content["sampling"], **kept}, "sampling."),
        evaluation=build(EvaluationOptions, evaluation, "evaluation."),
        checkpoint=checkpoint if content["subject"] == CHECKPOINT else None,
        seed=content["seed"],
    )


def measure(assignment: Assignment, progress: Progress | None = None) -> Measurement:
    """Runs an evaluation actor to its end and returns what it measured.

    If that actor itself is lost, another begins anew, up to MAX_COORDINATORS in all.

    Raises:
        TesseraError: actors keep dying, or the cluster has no room for them.
    """
    report = progress or log_progress()
    with reserved(assignment.evaluation) as group:
        for _ in range(MAX_COORDINATORS):
            try:
                return _measure(assignment, group, report)
            except RayActorError as error:
                # A RayTaskError is what this actor says of another one.
                if isinstance(error, RayTaskError) or error.actor_init_failed:
                    raise
                logger.warning("The evaluation actor died and begins anew: %s", str(error).splitlines()[0])
    raise TesseraError(
        f"The evaluation actor died {MAX_COORDINATORS} times, but a sound one does not. See the Ray logs for the reason; "
        "most often memory ran out."
    )


def _measure(assignment: Assignment, group: PlacementGroup, report: Progress) -> Measurement:
    # On a node of the others: it holds statistics and references, which a training node has no room for.
    place = PlacementGroupSchedulingStrategy(group)
    remote = ray.remote(EvaluationActor).options(
        num_cpus=0, max_restarts=0, max_concurrency=2, scheduling_strategy=place
    )
    actor: Any = remote.remote(assignment, group)
    totals = {
        "sampling": assignment.evaluation.num_samples if assignment.checkpoint_path else 0,
        "reference": len(assignment.reference_uris),
        "holdout": len(assignment.holdout_uris),
    }
    try:
        with user_errors():
            result = actor.measure.remote()
            while not ray.wait([result], timeout=1.0)[0]:
                report(ray.get(actor.progress.remote()), totals)
            return ray.get(result)
    finally:
        ray.kill(actor)


def log_progress(every_seconds: float = 15.0) -> Progress:
    """A Progress that writes a line to the log now and then."""
    last = time.monotonic()

    def report(done: dict[str, int], totals: dict[str, int]) -> None:
        nonlocal last
        if time.monotonic() - last >= every_seconds:
            last = time.monotonic()
            logger.info(
                "Evaluating: %s", ", ".join(f"{name} {done[name]}/{total}" for name, total in totals.items() if total and name in done)
            )

    return report
