"""The `reference` job: statistics of a source's images, kept for evaluations and written for others to read."""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray

from evaluation.extractors import open_extractor
from evaluation.feature_actor import FeatureActor
from evaluation.metrics import MetricPlan, plan_metrics
from evaluation.pool import ActorPool, run_items
from evaluation.reference import LAYOUT, statistics_npz
from evaluation.reference_job import (
    ReferenceImages,
    ReferenceOptions,
    RunImages,
    kept_features,
    prepare_references,
    references_of,
)
from evaluation.resources import actor_options, reserved
from evaluation.tally import Item
from pipeline import storage
from pipeline.sources import Source, open_source
from pipeline.views import preprocessing_spec
from stages.errors import ConfigError


def make_references(options: ReferenceOptions, output_path: str | None = None) -> dict[str, Any]:
    """Makes the references that `evaluation.metrics` need, where they are not there yet. Ray must be connected.

    Args:
        options: source, images, and the evaluation whose references they are.
        output_path: also write the statistics there, as an .npz in the layout of pytorch-fid and ADM.

    Returns:
        Of each reference its key, hash and number of images; and `output`.

    Raises:
        ConfigError: nothing to make, or several extractors for one file.
        ArtefactError, TesseraError: see `evaluation.reference_job`.
    """
    evaluation = options.evaluation
    plan = plan_metrics(evaluation)
    extractors = {name: open_extractor(name, evaluation) for name in plan.extractors()}
    source = open_source(options.source, options.images)
    prepared = prepare_references(options, source, plan, extractors)
    names = list(dict.fromkeys(name for name, _ in prepared.keys))
    if not names or output_path is not None and len(names) > 1:
        raise ConfigError(
            f"evaluation.metrics is {list(evaluation.metrics)}, which needs references of {len(names)} extractors, but "
            "reference makes those of at least one, and a file holds those of one. Name e.g. [fid, sfid] or [fd]."
        )
    images = ReferenceImages(
        path=evaluation.path,
        uris=prepared.uris,
        num_kept={key: kept_features(plan, key, evaluation) for key in prepared.keys},
    )
    widths = {(name, output): extractors[name].outputs[output] for name, output in prepared.keys}
    with feature_actors(options, source, plan) as run:
        made = references_of(images, prepared.keys, widths, run)
    if output_path is not None:
        extractor = extractors[names[0]]
        meta = {
            "extractor": extractor.name,
            "extractor_resize": extractor.resize,
            "extractor_fingerprint": extractor.fingerprint,
            "preprocessing": preprocessing_spec(options.images),
        }
        by_output = {output: stored for (_, output), stored in made.items() if output in LAYOUT}
        storage.replace(output_path, statistics_npz(by_output, meta))
    references = {"/".join(key): stored.to_dict() for key, stored in made.items()}
    return {"references": references, "output": output_path}


@contextmanager
def feature_actors(options: ReferenceOptions, source: Source, plan: MetricPlan) -> Iterator[RunImages]:
    """What runs work items over images on feature actors, for a `with` statement, after which these are gone."""
    evaluation = dataclasses.replace(options.evaluation, num_sampler_actors=0)
    size = evaluation.item_size

    def run(num_images: int, submit: Callable[[Item, Any], Any]) -> Iterator[tuple[Item, Any]]:
        items = [(start, min(start + size, num_images)) for start in range(0, num_images, size)]
        return run_items(items, lambda item, actors: submit(item, actors[0]), [pool], 2 * pool.size + 1)

    with reserved(evaluation) as group:
        remote: Any = ray.remote(**actor_options(evaluation, group))(FeatureActor)
        pool = ActorPool(
            "feature",
            lambda: remote.remote(source, options.images, evaluation, plan, None),
            evaluation.num_feature_actors,
        )
        try:
            yield run
        finally:
            pool.close()
