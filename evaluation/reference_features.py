"""Makes the references that are not there yet: features of the training images, added up in the order of the listing."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from evaluation.estimates import fair_choice
from evaluation.extractors import Extractor
from evaluation.gaussian_metric import GaussianMetric
from evaluation.metrics import SET_METRICS, FeatureKey, MetricPlan
from evaluation.reference import (
    StoredReference,
    choose_images,
    images_identity,
    load_reference,
    read_statistics,
    reference_key,
    store_reference,
)
from evaluation.self_test import NUM_IMAGES, check_extractor
from evaluation.set_tally import Features
from pipeline.sources import Source
from stages.errors import ConfigError, TesseraError
from stages.options import EvaluationOptions, ImageOptions, SourceOptions

logger = logging.getLogger(__name__)

LEAST_TESTED = 8


Item = tuple[int, int]
Call = tuple[str, tuple[Any, ...]]  # a method of FeatureActor and its arguments
# Makes one call for every work item over so many images. Results come in the order of the items.
RunCalls = Callable[[int, Callable[[Item], Call]], Iterator[tuple[Item, Any]]]


@dataclass(frozen=True, eq=False, kw_only=True)
class PreparedReferences:
    """What sets will be measured against.

    Attributes:
        given: from the file `evaluation.reference_path`.
        keys: of the others, which are kept under these keys or will be made.
        statistics_keys: of all, what decides their statistics, however many of their features are kept.
        uris: the training images to make them from.
    """

    given: dict[FeatureKey, StoredReference]
    keys: dict[FeatureKey, str]
    statistics_keys: dict[FeatureKey, str]
    uris: list[str]


@dataclass(frozen=True, eq=False, kw_only=True)
class ReferenceImages:
    """What references are made from, and where they are kept.

    Attributes:
        path: the evaluation folder.
        uris: the images.
        num_kept: by features, how many of these are kept themselves, for metrics that compare images one by one.
    """

    path: str
    uris: Sequence[str]
    num_kept: Mapping[FeatureKey, int]


@dataclass(frozen=True, kw_only=True)
class ReferenceOptions:
    """The sections that decide a reference."""

    source: SourceOptions
    images: ImageOptions
    evaluation: EvaluationOptions


def prepare_references(
    options: ReferenceOptions, source: Source, plan: MetricPlan, extractors: Mapping[str, Extractor]
) -> PreparedReferences:
    """Reads the references of `evaluation.reference_path`, or names those of the training images.

    Raises:
        ArtefactError: that file is missing, damaged, or of another extractor.
        ConfigError: it cannot serve all metrics.
    """
    evaluation = options.evaluation
    wanted = [key for key in plan.features() if plan.needs_reference(key)]
    if evaluation.reference_path is not None:
        check_file_serves(plan, wanted)
        read = {
            (name, output): read_statistics(evaluation.reference_path, output, extractors[name])
            for name, output in wanted
        }
        return PreparedReferences(given=read, keys={}, statistics_keys={key: stored.key for key, stored in read.items()}, uris=[])
    if not wanted:
        return PreparedReferences(given={}, keys={}, statistics_keys={}, uris=[])
    training = choose_images(source.list_images("train"), evaluation.num_reference_images)
    identity = images_identity(options.source, options.images, training)

    def key_of(key: FeatureKey, num_kept: int) -> str:
        return reference_key(identity, extractors[key[0]].fingerprint, key[1], num_kept)

    return PreparedReferences(
        given={},
        keys={key: key_of(key, kept_features(plan, key, evaluation)) for key in wanted},
        statistics_keys={key: key_of(key, 0) for key in wanted},
        uris=training["uri"].to_pylist(),
    )


def check_file_serves(plan: MetricPlan, wanted: Sequence[FeatureKey]) -> None:
    """Refuses a file of statistics for metrics that need features themselves, or more than one extractor."""
    pairwise = [name for name, kind in SET_METRICS.items() for metric in plan.sets if metric.kind is kind and kind.cls.is_pairwise]
    if pairwise:
        raise ConfigError(
            f"evaluation.reference_path is given, but {pairwise[0]} needs the features of reference images. "
            "Leave it out of evaluation.metrics, or measure against the source's training images."
        )
    names = list(dict.fromkeys(name for name, _ in wanted))
    if len(names) > 1:
        raise ConfigError(
            f"evaluation.reference_path is given, but evaluation.metrics needs {' and '.join(names)}, and a file holds "
            "statistics of one extractor. Name metrics of one extractor."
        )


def kept_features(plan: MetricPlan, key: FeatureKey, options: EvaluationOptions) -> int:
    """How many reference features are kept under this key."""
    return options.num_pairwise_images if plan.is_pairwise(key) else 0


def references_of(
    images: ReferenceImages, keys: Mapping[FeatureKey, str], widths: Mapping[FeatureKey, int], run: RunCalls
) -> dict[FeatureKey, StoredReference]:
    """The references under these keys, made in one pass over the images where they are not there yet.

    Raises:
        TesseraError: fewer than two images can be used, or an extractor fails its self-test.
        ArtefactError: one that is there is damaged.
    """
    found = {features: load_reference(images.path, key) for features, key in keys.items()}
    missing = [features for features, stored in found.items() if stored is None]
    if missing:
        found |= _made(images, {features: keys[features] for features in missing}, widths, run)
    return {features: stored for features, stored in found.items() if stored is not None}


def _made(
    images: ReferenceImages, keys: Mapping[FeatureKey, str], widths: Mapping[FeatureKey, int], run: RunCalls
) -> dict[FeatureKey, StoredReference]:
    uris, wanted = images.uris, list(keys)
    tallies = {features: GaussianMetric(widths[features]) for features in keys}
    kept: dict[FeatureKey, list[np.ndarray]] = {features: [] for features in keys}
    first: dict[FeatureKey, list[np.ndarray]] = {features: [] for features in keys}
    chosen = {features: fair_choice(len(uris), images.num_kept[features]) for features in keys}
    usable: list[np.ndarray] = []
    fingerprints: dict[str, str] = {}

    def call(item: Item) -> Call:
        return "of_reference", (uris[slice(*item)], wanted)

    for item, (found, is_usable, made_with) in run(len(uris), call):
        fingerprints |= made_with
        indices = np.arange(*item)[is_usable]
        usable.append(indices)
        for features, values in found.items():
            tallies[features].update(torch.tensor(values))
            if images.num_kept[features]:
                kept[features].append(values[chosen[features][indices]])
            if item[0] < 2 * NUM_IMAGES:
                first[features].append(np.array(values))
    positions = np.concatenate(usable)
    if len(positions) < 2:
        raise TesseraError(
            f"{len(positions)} of {len(uris)} training images can be used, but a reference needs two. "
            "Check the source."
        )
    tests = _self_tests({features: np.concatenate(values) for features, values in first.items()}, uris, run)
    return {
        features: store_reference(
            images.path,
            key,
            tallies[features].statistics()[0],
            num_unusable=len(uris) - len(positions),
            features=np.concatenate(kept[features]) if kept[features] else None,
            kept=positions[chosen[features][positions]],
            self_test=tests.get(features),
            extractor_fingerprint=fingerprints[features[0]],
        )
        for features, key in keys.items()
    }


def run_self_tests(uris: Sequence[str], keys: Sequence[FeatureKey], run: RunCalls) -> dict[FeatureKey, dict[str, float]]:
    """Distances of `check_extractor` for the extractors of references that were not made here, on the first of these real images.

    Raises:
        TesseraError: an extractor fails.
    """
    found: dict[FeatureKey, list[np.ndarray]] = {features: [] for features in keys}
    for _, (parts, *_) in run(min(len(uris), 2 * NUM_IMAGES), lambda item: ("of_reference", (uris[slice(*item)], keys))):
        for features, values in parts.items():
            found[features].append(np.array(values))
    return _self_tests({features: np.concatenate(values) for features, values in found.items()}, uris, run)


def _self_tests(first: Features, uris: Sequence[str], run: RunCalls) -> dict[FeatureKey, dict[str, float]]:
    """Of each extractor the distances of `check_extractor`, of up to 128 images to as many others."""
    wanted = list(first)
    half = min(NUM_IMAGES, min(len(values) for values in first.values()) // 2)
    if half < LEAST_TESTED:
        logger.warning("Too few real images (%d) to test the extractors on.", len(uris))
        return {}
    others = uris[half:]
    parts: list[Features] = [
        found for _, found in run(half, lambda item: ("of_damaged", (others[slice(*item)], wanted)))
    ]
    tests = {}
    for features in wanted:
        worse = np.concatenate([part[features] for part in parts])
        real, other = first[features][:half], first[features][half : 2 * half]
        tests[features] = check_extractor("/".join(features), real, other, worse)
    return tests
