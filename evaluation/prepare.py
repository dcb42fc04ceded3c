"""What one evaluation is: opened, checked and chosen before any actor starts, with the identity that names its record."""

import dataclasses
import logging
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from cluster.checkpoints import SAMPLED_FROM, Commit, resolve_checkpoint
from cluster.sampler_actor import open_sampled_conditions, warn_of_guidance
from evaluation.actor import Assignment
from evaluation.code_matches import TrainingCodes
from evaluation.describe import (
    Means,
    describe_checkpoint,
    describe_measurement,
    describe_protocols,
    describe_tokenizer,
    identify_measurement,
)
from evaluation.estimates import check_num_samples
from evaluation.extractors import open_extractor, output_width
from evaluation.feature_actor import VIEW
from evaluation.hashing import canonical_hash
from evaluation.metrics import MetricPlan, check_metrics_fit, plan_metrics
from evaluation.pixel_metrics import PIXEL_METRICS
from evaluation.reference import choose_images, images_identity
from evaluation.reference_features import ReferenceOptions, prepare_references
from evaluation.set_metric import HOLDOUT, RECONSTRUCTIONS, SAMPLES
from pipeline.binding import check_preprocessing
from pipeline.code_dataset import CodeDataset
from pipeline.condition_codes import check_same_images, find_images
from pipeline.inputs import IMAGE, check_fit, check_maps, needed_maps
from pipeline.sources import Source, list_split, open_source
from pipeline.tokenizers import open_tokenizer
from stages.errors import ArtefactError, ConfigError
from stages.first_stage.tokenizer import Tokenizer
from stages.options import (
    CodesOptions,
    ConditioningOptions,
    EvaluationOptions,
    ImageOptions,
    RunOptions,
    SamplingOptions,
    SourceOptions,
    TokenizerOptions,
)

logger = logging.getLogger(__name__)

ALL_SETS = (SAMPLES, RECONSTRUCTIONS, HOLDOUT)


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
    conditioning: ConditioningOptions
    sampling: SamplingOptions
    evaluation: EvaluationOptions
    checkpoint: str | None = "latest"
    seed: int | None = None

    def draws(self) -> SamplingOptions:
        """How samples are drawn, with the seed that counts."""
        return self.sampling if self.seed is None else dataclasses.replace(self.sampling, seed=self.seed)


@dataclass(frozen=True, eq=False, kw_only=True)
class Preparation:
    """A checked evaluation: the work, the identity that names its record, and what the record says besides numbers."""

    assignment: Assignment
    identity: dict[str, Any]
    description: dict[str, Any]


def prepare(options: EvaluateOptions) -> Preparation:
    """Opens, checks and chooses everything, before any actor starts. Raises what `evaluate` raises."""
    evaluation, images = options.evaluation, options.images
    check_num_samples(evaluation)
    commit = resolve_checkpoint(options.checkpoint, options.run.path, SAMPLED_FROM) if options.checkpoint is not None else None
    tokenizer = open_tokenizer(options.tokenizer.path)
    _check_tokenizer(options, tokenizer)
    source = open_source(options.source, images, needed_maps(options.tokenizer))
    holdout = _choose_holdout(source, options)
    class_names = source.class_names
    training_codes: TrainingCodes | None = None
    conditions: CodeDataset | None = None
    plan = plan_metrics(evaluation, ALL_SETS if commit is not None else (RECONSTRUCTIONS, HOLDOUT))
    sampling = options.draws()
    if commit is not None:
        warn_of_guidance(commit, sampling)
        dataset = CodeDataset.open(options.codes.path, verify=False)
        check_binding(options, commit, dataset, tokenizer, source)
        class_names = dataset.class_names
        conditions = open_sampled_conditions(commit, options.conditioning.sampled_codes_path)
        if plan.has_code_matches:
            training_codes = open_training_codes(dataset, commit)
    else:
        evaluation = dataclasses.replace(evaluation, num_sampler_actors=0)
    check_maps(source, holdout["uri"], options.tokenizer)
    holdout_conditions: np.ndarray | None = None
    if conditions is not None and plan.has_likelihood:
        holdout_conditions = _holdout_conditions(conditions, holdout)
        plan = dataclasses.replace(plan, has_likelihood=holdout_conditions is not None)
    extractors = {name: open_extractor(name, evaluation) for name in plan.extractors()}
    deciding = ReferenceOptions(source=options.source, images=images, evaluation=evaluation)
    references = prepare_references(deciding, source, plan, extractors)
    _check_neighbours(plan, evaluation, len(references.uris))
    pixel_metrics = {name: PIXEL_METRICS[name](evaluation) for name in plan.pixels}
    networks = {name: metric.fingerprint for name, metric in pixel_metrics.items() if hasattr(metric, "fingerprint")}
    means = Means(plan=plan, extractors=extractors, references=references, networks=networks)
    assignment = Assignment(
        checkpoint_path=commit.path if commit is not None else None,
        tokenizer=options.tokenizer,
        sampling=sampling,
        images=images,
        evaluation=evaluation,
        source=source,
        plan=plan,
        widths={(name, output): output_width(extractors[name], output) for name, output in plan.features()},
        references=references.given,
        reference_keys=references.keys,
        reference_uris=references.uris,
        holdout_uris=holdout["uri"].to_pylist(),
        holdout_labels=holdout["label"].fill_null(-1).to_numpy().astype(np.int64),
        holdout_conditions=holdout_conditions,
        codebook_size=tokenizer.codebook_size,
        num_codes=math.prod(tokenizer.grid(images.size)),
        training_codes=training_codes,
        conditions_path=conditions.path if conditions is not None else None,
    )
    subject = describe_tokenizer(options.tokenizer, tokenizer) if commit is None else describe_checkpoint(commit, sampling)
    if conditions is not None:
        subject["conditions_root_hash"] = conditions.root_hash
    return Preparation(
        assignment=assignment,
        identity={
            **{name: value for name, value in subject.items() if name not in ("checkpoint", "step")},
            **identify_measurement(evaluation, means),
            **({"training_codes_root_hash": training_codes.root_hash} if training_codes else {}),
            "holdout_key": canonical_hash(_holdout_identity(options, plan, holdout)),
        },
        description={
            **subject,
            **describe_measurement(deciding, means),
            **describe_protocols(evaluation, means),
            "class_names": list(class_names),
        },
    )


def _holdout_identity(options: EvaluateOptions, plan: MetricPlan, holdout: pa.Table) -> dict[str, Any]:
    """The held-out images, and their classes where likelihoods under these are measured."""
    identity = images_identity(options.source, options.images, holdout)
    return identity | ({"labels": canonical_hash(holdout["label"].to_pylist())} if plan.has_likelihood else {})


def _check_neighbours(plan: MetricPlan, evaluation: EvaluationOptions, num_reference: int) -> None:
    """Refuses fewer images than the neighbours that metrics look for: among so few, every image lies in every ball."""
    kept = 1.0 - (2 if evaluation.num_blocks > 2 else evaluation.num_blocks - 1) / evaluation.num_blocks  # by the jackknife
    for planned in plan.sets:
        k = planned.kind.cls.num_neighbours
        if k == 0:
            continue
        for key, num_images in (("num_reference_images", num_reference), ("num_samples", int(evaluation.num_samples * kept))):
            if min(num_images, evaluation.num_pairwise_images) <= k:
                raise ConfigError(
                    f"evaluation.{key} makes {min(num_images, evaluation.num_pairwise_images)} images that are compared one by one, but "
                    f"{planned.name} looks for the {k} nearest of them. Raise it, or leave {planned.name} out of evaluation.metrics."
                )


def _check_tokenizer(options: EvaluateOptions, tokenizer: Tokenizer) -> None:
    if options.tokenizer.input != IMAGE and options.checkpoint is not None:
        raise ConfigError(
            f"tokenizer.input is {options.tokenizer.input}, but samples are measured as images. Name the tokenizer of the images, or "
            f"measure this one alone by evaluate --tokenizer."
        )
    check_metrics_fit(options.evaluation, options.tokenizer)
    check_fit(tokenizer.config, options.images, options.tokenizer)


def _choose_holdout(source: Source, options: EvaluateOptions) -> pa.Table:
    num_samples, num_blocks = options.evaluation.num_samples, options.evaluation.num_blocks
    holdout = choose_images(list_split(source, options.source, "holdout"), num_samples)
    if holdout.num_rows < 2 * num_blocks:
        raise ConfigError(
            f"source.name is {options.source.name} with {holdout.num_rows} held-out images, but the error bars need two per block of "
            f"evaluation.num_blocks ({num_blocks}). Hold out more images, or lower evaluation.num_blocks."
        )
    if holdout.num_rows < num_samples:
        logger.warning(
            "evaluation.num_samples is %d, but there are %d held-out images: the distances of held-out images and "
            "reconstructions are measured on these. They do not compare with that of the samples, because a distance "
            "falls as the number of images grows.",
            num_samples,
            holdout.num_rows,
        )
    return holdout


def _holdout_conditions(conditions: CodeDataset, holdout: pa.Table) -> np.ndarray | None:
    """Codes (m, P) of the conditions of held-out images; None, which is logged, where there are not all of them.

    Raises:
        ArtefactError: they are of other images.
    """
    found = find_images(conditions, holdout["image_id"].to_numpy())
    if conditions.manifest["views"][0] != VIEW or (found < 0).any():
        logger.warning(
            "likelihood is left out: it needs the %s view of all held-out images in the code dataset of conditions %s, which has "
            "the views %s of %d of %d. Name one of theirs by conditioning.validation_codes_path.",
            VIEW,
            conditions.path,
            ", ".join(conditions.manifest["views"]),
            int((found >= 0).sum()),
            len(found),
        )
        return None
    check_same_images(conditions, holdout, holdout["image_id"].to_numpy(), "the held-out images of the source")
    return conditions.codes(found * conditions.num_views)


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
    check_preprocessing(options.images, options.tokenizer, dataset)
    if source.class_names and dataset.class_names and tuple(source.class_names) != tuple(dataset.class_names):
        raise ArtefactError(
            f"source.name is {options.source.name} with classes {', '.join(source.class_names)}, but "
            f"{options.codes.path} has classes {', '.join(dataset.class_names)}. Use images of the same classes."
        )


def open_training_codes(dataset: CodeDataset, commit: Commit) -> TrainingCodes:
    """The codes to compare samples of a checkpoint with.

    Raises:
        ArtefactError: they are codes of another tokenizer, which an imported checkpoint does not rule out.
    """
    if dataset.tokenizer_fingerprint != commit.tokenizer_fingerprint:
        raise ArtefactError(
            f"codes.path is {dataset.path} with codes of tokenizer {dataset.tokenizer_fingerprint}, but memorisation compares "
            f"them with those that checkpoint {commit.path} draws, which are of tokenizer {commit.tokenizer_fingerprint}. "
            "Name a code dataset of that tokenizer, or leave memorisation out of evaluation.metrics."
        )
    return TrainingCodes(path=dataset.path, root_hash=dataset.root_hash)
