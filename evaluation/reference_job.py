"""The `reference` job: statistics of a source's images by Ray Data, kept for evaluations and written for others to read."""

import dataclasses
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import ray.data

from evaluation.extractors import open_extractor
from evaluation.feature_actor import FeatureActor
from evaluation.metrics import MetricPlan, plan_metrics
from evaluation.pool import MAX_ATTEMPTS
from evaluation.reference import LAYOUT, statistics_npz
from evaluation.reference_features import (
    Call,
    ReferenceImages,
    ReferenceOptions,
    RunCalls,
    kept_features,
    prepare_references,
    references_of,
)
from evaluation.resources import bundle
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
        ArtefactError, TesseraError: see `evaluation.reference_features`.
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
    made = references_of(images, prepared.keys, widths, on_ray_data(options, source, plan))
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


class FeatureCalls:
    """A FeatureActor among Ray Data's actors: calls in, results out, both pickled, since Ray Data would make Arrow of them."""

    def __init__(self, *arguments: Any):
        self._actor = FeatureActor(*arguments)

    def __call__(self, row: dict[str, bytes]) -> dict[str, bytes]:
        method, arguments = pickle.loads(row["call"])
        return {"result": pickle.dumps(getattr(self._actor, method)(*arguments))}


def on_ray_data(options: ReferenceOptions, source: Source, plan: MetricPlan) -> RunCalls:
    """What makes calls on `evaluation.num_feature_actors` actors of Ray Data, which replaces those that die."""
    evaluation = dataclasses.replace(options.evaluation, num_sampler_actors=0)
    size = evaluation.item_size
    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    context.wait_for_min_actors_s = int(evaluation.start_timeout_seconds)

    def run(num_images: int, call: Callable[[Item], Call]) -> Iterator[tuple[Item, Any]]:
        items = [(start, min(start + size, num_images)) for start in range(0, num_images, size)]
        resources = bundle(evaluation)
        with ray.data.DataContext.current(context):
            calls = ray.data.from_items([{"call": pickle.dumps(call(item))} for item in items], override_num_blocks=len(items))
            results = calls.map(
                FeatureCalls,  # type: ignore[arg-type]  # a class is what an actor pool takes
                fn_constructor_args=(source, options.images, evaluation, plan, None),
                compute=ray.data.ActorPoolStrategy(size=evaluation.num_feature_actors),
                num_cpus=resources.pop("CPU"),
                num_gpus=resources.pop("GPU", 0.0),
                resources=resources,
                max_restarts=MAX_ATTEMPTS - 1,
                max_task_retries=MAX_ATTEMPTS - 1,
            )
        for item, row in zip(items, results.iter_rows(), strict=True):
            yield item, pickle.loads(row["result"])

    return run
