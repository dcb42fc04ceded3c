"""The `evaluate` job: one checkpoint, or one tokenizer alone, one record."""

import dataclasses
import datetime
import logging
import math
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import ray

from cluster.checkpoints import Commit, resolve_checkpoint
from cluster.runtime import user_errors
from evaluation.actor import Assignment, EvaluationActor, Measurement
from evaluation.extractors import Extractor, distance_name, open_extractor
from evaluation.hashing import canonical_hash
from evaluation.metrics import MetricPlan, plan_metrics
from evaluation.pixel_metrics import PIXEL_METRICS
from evaluation.records import Record, find_record, read_record, record_id, write_record
from evaluation.reference import choose_images, images_identity
from evaluation.reference_job import ReferenceOptions, prepare_references
from evaluation.set_metric import HOLDOUT, RECONSTRUCTIONS, SAMPLES
from pipeline import storage
from pipeline.binding import check_preprocessing
from pipeline.code_dataset import CodeDataset
from pipeline.sources import Source, open_source
from pipeline.tokenizers import open_tokenizer
from stages.config import build, to_dict
from stages.errors import ArtefactError, ConfigError
from stages.first_stage.tokenizer import Tokenizer
from stages.options import (
    CodesOptions,
    EvaluationOptions,
    ImageOptions,
    RunOptions,
    SamplingOptions,
    SourceOptions,
    TokenizerOptions,
)

logger = logging.getLogger(__name__)

TOLERANCE = 1e-6
CHECKPOINT, TOKENIZER = "checkpoint", "tokenizer"
ALL_SETS = (SAMPLES, RECONSTRUCTIONS, HOLDOUT)
PACKAGES = ("tessera", "torch", "numpy", "pillow", "ray")

# Called about once a second with the images finished so far by phase (sampling, reference, holdout) and the totals of
# all phases.
Progress = Callable[[dict[str, int], dict[str, int]], None]


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """The sections that `evaluate` takes.

    Attributes:
        checkpoint: a checkpoint's folder, or "latest" of `run.path`; None measures the tokenizer alone.
        seed: seed of the draws; `sampling.seed` if not given.
    """

    run: RunOptions
    source: SourceOptions
    images: ImageOptions
    tokenizer: TokenizerOptions
    codes: CodesOptions
    sampling: SamplingOptions
    evaluation: EvaluationOptions
    checkpoint: str | None = "latest"
    seed: int | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class Preparation:
    """A checked evaluation: the work, the identity that names its record, and what the record says besides numbers."""

    assignment: Assignment
    identity: dict[str, Any]
    description: dict[str, Any]


def evaluate(options: EvaluateOptions, progress: Progress | None = None) -> Record:
    """Measures a checkpoint or tokenizer and stores the record, or returns that of the same evaluation if there is one.

    Ray must be connected.

    Raises:
        ArtefactError: checkpoint, code dataset and tokenizer do not belong together, or one is missing or damaged.
        ConfigError: no such metric, extractor or source, no held-out images, or too few samples for the error bars.
        TesseraError: actors keep dying, images cannot be read, or the store lets two writers of one key both win.
    """
    begin = time.monotonic()
    preparation = prepare(options)
    identifier = record_id(preparation.identity)
    present = find_record(options.evaluation.path, identifier)
    if present is not None:
        logger.info("This evaluation has been made before: %s", present.path)
        return present
    storage.check_conditional_put(options.evaluation.path)
    measurement = measure(preparation.assignment, progress)
    references = {"/".join(key): stored.to_dict() for key, stored in measurement.references.items()}
    content = {
        "metrics": {name: estimate.to_dict() for name, estimate in measurement.metrics.items()},
        **preparation.description,
        "reference": next(iter(references.values()), {}),
        "references": references,
        "num_unusable_holdout": measurement.num_unusable,
        "identity": preparation.identity,
        "versions": {name: version(name) for name in PACKAGES} | {"python": platform.python_version()},
        "created_at": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="milliseconds"),
        "wall_seconds": {
            name: round(s, 3) for name, s in {**measurement.wall_seconds, "total": time.monotonic() - begin}.items()
        },
    }
    return write_record(options.evaluation.path, identifier, content, measurement.grids)


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
    return differences(record, measure(preparation.assignment, progress))


def differences(record: Record, measurement: Measurement) -> list[str]:
    """Numbers of a record that a new measurement does not confirm to 1e-6 relative."""
    again = {name: estimate.to_dict() for name, estimate in measurement.metrics.items()}
    problems = [f"{name}: in one of the two only" for name in sorted(again.keys() ^ record.metrics.keys())]
    for name in sorted(again.keys() & record.metrics.keys()):
        for key, expected in record.metrics[name].items():
            found = again[name].get(key)
            if expected != found and not (expected and found and abs(found - expected) <= TOLERANCE * abs(expected)):
                problems.append(f"{name} {key}: the record has {expected}, measured again it is {found}")
    return problems


def _options_of(record: Record, options: EvaluateOptions) -> EvaluateOptions:
    """`options` with everything that decides the numbers taken from the record."""
    content = record.content
    kept = {"path": options.sampling.path, "num_samples": options.sampling.num_samples}
    evaluation = {**to_dict(options.evaluation), **content["evaluation"]}
    checkpoint = content["checkpoint"] if options.checkpoint == "latest" else options.checkpoint
    return dataclasses.replace(
        options,
        sampling=build(SamplingOptions, {**content["sampling"], **kept}, "sampling."),
        evaluation=build(EvaluationOptions, evaluation, "evaluation."),
        checkpoint=checkpoint if content["subject"] == CHECKPOINT else None,
        seed=content["seed"],
    )


def prepare(options: EvaluateOptions) -> Preparation:
    """Opens, checks and chooses everything, before any actor starts. Raises what `evaluate` raises."""
    evaluation, images = options.evaluation, options.images
    if evaluation.num_samples < 2 * evaluation.num_blocks:
        raise ConfigError(
            f"evaluation.num_samples is {evaluation.num_samples}, but the error bars need two per block of "
            f"evaluation.num_blocks ({evaluation.num_blocks}). Raise it to {2 * evaluation.num_blocks}."
        )
    commit = resolve_checkpoint(options.checkpoint, options.run.path) if options.checkpoint is not None else None
    tokenizer = open_tokenizer(options.tokenizer.path)
    source = open_source(options.source, images)
    if commit is not None:
        check_binding(options, commit, CodeDataset.open(options.codes.path, verify=False), tokenizer, source)
    plan = plan_metrics(evaluation, ALL_SETS if commit is not None else (RECONSTRUCTIONS, HOLDOUT))
    extractors = {name: open_extractor(name, evaluation) for name in plan.extractors()}
    sampling = dataclasses.replace(
        options.sampling, seed=options.sampling.seed if options.seed is None else options.seed
    )
    holdout = choose_images(source.list_images("holdout"), evaluation.num_samples)
    if holdout.num_rows < evaluation.num_samples:
        logger.warning(
            "evaluation.num_samples is %d, but there are %d held-out images: the distances of held-out images and "
            "reconstructions are measured on these. They do not compare with that of the samples, because a distance "
            "falls as the number of images grows.",
            evaluation.num_samples,
            holdout.num_rows,
        )
    deciding = ReferenceOptions(source=options.source, images=images, evaluation=evaluation)
    references = prepare_references(deciding, source, plan, extractors)
    assignment = Assignment(
        checkpoint_path=commit.path if commit is not None else None,
        tokenizer_path=options.tokenizer.path,
        sampling=sampling,
        images=images,
        evaluation=evaluation,
        source=source,
        plan=plan,
        widths={key: extractors[key[0]].outputs[key[1]] for key in plan.features()},
        references=references.given,
        reference_keys=references.keys,
        reference_uris=references.uris,
        holdout_uris=holdout["uri"].to_pylist(),
        holdout_labels=holdout["label"].fill_null(-1).to_numpy().astype(np.int64),
        codebook_size=tokenizer.codebook_size,
        num_codes=math.prod(tokenizer.grid(images.size)),
    )
    subject = _describe_checkpoint(commit, sampling) if commit is not None else _describe_tokenizer(options, tokenizer)
    description = {**subject, **_describe(options, plan, extractors)}
    paths = ("checkpoint", "step")
    identity = {
        **{name: value for name, value in subject.items() if name not in paths},
        "metrics": plan.names(),
        "extractor_fingerprints": {name: extractor.fingerprint for name, extractor in extractors.items()},
        "num_samples": evaluation.num_samples,
        "num_blocks": evaluation.num_blocks,
        "reference_keys": {
            **{"/".join(key): stored.key for key, stored in references.given.items()},
            **{"/".join(key): value for key, value in references.keys.items()},
        },
        "holdout_key": canonical_hash(images_identity(options.source, images, holdout)),
    }
    for name in plan.pixels:
        fingerprint = getattr(PIXEL_METRICS[name](evaluation), "fingerprint", None)
        if fingerprint is not None:
            identity[f"{name}_fingerprint"] = fingerprint
    if any(plan.is_pairwise(key) for key in plan.features()):
        identity["num_pairwise_images"] = evaluation.num_pairwise_images
    return Preparation(assignment=assignment, identity=identity, description=description)


def _describe_checkpoint(commit: Commit, sampling: SamplingOptions) -> dict[str, Any]:
    return {
        "subject": CHECKPOINT,
        "checkpoint": commit.path,
        "checkpoint_hash": commit.hash,
        "step": commit.step,
        "tokenizer_fingerprint": commit.tokenizer_fingerprint,
        "code_dataset_root_hash": commit.root_hash,
        "sampling": {k: v for k, v in to_dict(sampling).items() if k not in ("path", "num_samples")},
        "seed": sampling.seed,
    }


def _describe_tokenizer(options: EvaluateOptions, tokenizer: Tokenizer) -> dict[str, Any]:
    """As of a checkpoint, so that a history of both can be read in one way; the tokenizer's folder stands for it."""
    return {
        "subject": TOKENIZER,
        "checkpoint": options.tokenizer.path,
        "checkpoint_hash": tokenizer.fingerprint,
        "step": 0,
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "sampling": {},
        "seed": 0,
    }


def _describe(options: EvaluateOptions, plan: MetricPlan, extractors: dict[str, Extractor]) -> dict[str, Any]:
    """What a record says of the measurement besides its numbers. `extractor…` and `distance` are of the first metric."""
    deciding = (
        "num_samples",
        "num_reference_images",
        "metrics",
        "extractor",
        "extractor_resolution",
        "num_blocks",
        "num_pairwise_images",
    )
    first = extractors[plan.features()[0][0]] if plan.sets else None
    return {
        "evaluation": {k: v for k, v in to_dict(options.evaluation).items() if k in deciding},
        "distance": distance_name(first) if first else None,
        "extractor": first.name if first else None,
        "extractor_resize": first.resize if first else None,
        "extractor_fingerprint": first.fingerprint if first else None,
        "extractors": {
            name: {"name": each.name, "resize": each.resize, "fingerprint": each.fingerprint}
            for name, each in extractors.items()
        },
        "images": to_dict(options.images),
        "source": to_dict(options.source),
    }


def check_binding(
    options: EvaluateOptions, commit: Commit, dataset: CodeDataset, tokenizer: Tokenizer, source: Source
) -> None:
    """Refuses a checkpoint, code dataset, tokenizer and source that do not belong together.

    Raises:
        ArtefactError: naming both sides.
        ConfigError: the images are prepared otherwise than the code dataset's.
    """
    if not commit.is_imported and dataset.root_hash != commit.root_hash:
        raise ArtefactError(
            f"codes.path is {options.codes.path} with root hash {dataset.root_hash}, but checkpoint {commit.path} was "
            f"trained on the code dataset with root hash {commit.root_hash}. Name that dataset."
        )
    if tokenizer.fingerprint != commit.tokenizer_fingerprint:
        raise ArtefactError(
            f"tokenizer.path is {options.tokenizer.path} with fingerprint {tokenizer.fingerprint}, but checkpoint "
            f"{commit.path} was trained on codes of tokenizer {commit.tokenizer_fingerprint}. Name that tokenizer."
        )
    check_preprocessing(options.images, dataset)
    if source.class_names and dataset.class_names and tuple(source.class_names) != tuple(dataset.class_names):
        raise ArtefactError(
            f"source.name is {options.source.name} with classes {', '.join(source.class_names)}, but "
            f"{options.codes.path} has classes {', '.join(dataset.class_names)}. Use images of the same classes."
        )


def measure(assignment: Assignment, progress: Progress | None = None) -> Measurement:
    """Runs an evaluation actor to its end and returns what it measured."""
    actor: Any = ray.remote(EvaluationActor).options(num_cpus=0, max_restarts=0, max_concurrency=2).remote(assignment)
    totals = {
        "sampling": assignment.evaluation.num_samples if assignment.checkpoint_path else 0,
        "reference": len(assignment.reference_uris),
        "holdout": len(assignment.holdout_uris),
    }
    report = progress or log_progress()
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
                "Evaluating: %s", ", ".join(f"{name} {done[name]}/{totals[name]}" for name in totals if name in done)
            )

    return report
