"""What a record says of an evaluation besides its numbers: what was measured, how, and what decides its identity."""

from dataclasses import dataclass
from typing import Any

from cluster.checkpoints import Commit
from evaluation.extractors import Extractor, distance_name
from evaluation.gaussian_metric import FrechetDistance
from evaluation.metrics import MetricPlan, PlannedSetMetric
from evaluation.reference_features import PreparedReferences, ReferenceOptions
from pipeline.inputs import IMAGE
from stages.config import to_dict
from stages.first_stage.tokenizer import Tokenizer
from stages.options import EvaluationOptions, SamplingOptions, TokenizerOptions

CHECKPOINT, TOKENIZER = "checkpoint", "tokenizer"


def describe_checkpoint(commit: Commit, sampling: SamplingOptions) -> dict[str, Any]:
    """What is measured of a checkpoint."""
    return {
        "subject": CHECKPOINT,
        "checkpoint": commit.path,
        "checkpoint_hash": commit.hash,
        "step": commit.step,
        "tokenizer_fingerprint": commit.tokenizer_fingerprint,
        "code_dataset_root_hash": commit.root_hash,
        "sampling": recorded_sampling(sampling),
        "seed": sampling.seed,
    }


def describe_tokenizer(options: TokenizerOptions, tokenizer: Tokenizer) -> dict[str, Any]:
    """As of a checkpoint, so that a history of both can be read in one way; the tokenizer's folder stands for it."""
    return {
        "subject": TOKENIZER,
        "checkpoint": options.path,
        "checkpoint_hash": tokenizer.fingerprint,
        "step": 0,
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "sampling": {},
        "seed": 0,
        **({} if options.input == IMAGE else {"input": options.input, "num_labels": options.num_labels}),
    }


def recorded_sampling(sampling: SamplingOptions) -> dict[str, Any]:
    """What a record says of how its samples were drawn."""
    return {k: v for k, v in to_dict(sampling).items() if k not in ("path", "num_samples")}


@dataclass(frozen=True, eq=False, kw_only=True)
class Means:
    """What an evaluation measures with.

    Attributes:
        plan: the metrics.
        extractors: by name.
        references: of the features.
        networks: fingerprints by name of the pixel metrics that have one.
    """

    plan: MetricPlan
    extractors: dict[str, Extractor]
    references: PreparedReferences
    networks: dict[str, str]


def identify_measurement(evaluation: EvaluationOptions, means: Means) -> dict[str, Any]:
    """How it is measured, as it enters a record's identity."""
    plan, references = means.plan, means.references
    keys = {**{key: stored.key for key, stored in references.given.items()}, **references.keys}
    identity = {
        "metrics": plan.names(),
        "extractor_fingerprints": {name: extractor.fingerprint for name, extractor in means.extractors.items()},
        "num_samples": evaluation.num_samples,
        "num_blocks": evaluation.num_blocks,
        "reference_keys": {"/".join(key): value for key, value in keys.items()},
        **{f"{name}_fingerprint": fingerprint for name, fingerprint in means.networks.items()},
    }
    if any(plan.is_pairwise(key) for key in plan.features()):
        identity["num_pairwise_images"] = evaluation.num_pairwise_images
    return identity


def describe_protocols(evaluation: EvaluationOptions, means: Means) -> dict[str, Any]:
    """`protocols`: how metrics are measured that another evaluation may measure otherwise, by their names in records; and
    `reference_key`, of the extractor that names the record. Where records that are compared both have one, it must be the same."""
    statistics_keys = means.references.statistics_keys
    protocols: dict[str, dict[str, Any]] = {name: {"fingerprint": network} for name, network in means.networks.items()}
    for metric in means.plan.sets:
        extractor = means.extractors[metric.extractor]
        how: dict[str, Any] = {
            "extractor": extractor.name,
            "fingerprint": extractor.fingerprint,
            "reference": statistics_keys.get(metric.features),
        }
        if metric.kind.cls.is_pairwise:
            how["num_pairwise_images"] = evaluation.num_pairwise_images
        protocols |= {name: how for image_set in metric.kind.cls.measures for name in metric.record_names(image_set)}
    main = _main_metric(means.plan)
    return {"protocols": protocols, "reference_key": statistics_keys.get(main.features) if main else None}


def _main_metric(plan: MetricPlan) -> PlannedSetMetric | None:
    """The metric whose extractor names a record: the first Fréchet distance, or the first metric of features."""
    distances = [metric for metric in plan.sets if metric.kind.cls is FrechetDistance]
    return next(iter([*distances, *plan.sets]), None)


def describe_measurement(options: ReferenceOptions, means: Means) -> dict[str, Any]:
    """What a record says of the measurement besides its numbers. `extractor…` and `distance` are those of the first Fréchet distance,
    or of the first metric."""
    deciding = (
        "num_samples",
        "num_reference_images",
        "metrics",
        "extractor",
        "extractor_resolution",
        "num_blocks",
        "num_pairwise_images",
        "reference_path",
    )
    main = _main_metric(means.plan)
    first = means.extractors[main.extractor] if main else None
    return {
        "evaluation": {k: v for k, v in to_dict(options.evaluation).items() if k in deciding},
        "distance": distance_name(first) if first else None,
        "extractor": first.name if first else None,
        "extractor_resize": first.resize if first else None,
        "extractor_fingerprint": first.fingerprint if first else None,
        "extractors": {
            name: {"name": each.name, "resize": each.resize, "fingerprint": each.fingerprint}
            for name, each in means.extractors.items()
        },
        "images": to_dict(options.images),
        "source": to_dict(options.source),
    }
