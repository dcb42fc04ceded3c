"""The evaluation actor: coordinates sampler actors and feature actors and adds up what they return.

Work items are ranges of image indices whose bounds do not depend on the number of actors. Images go from sampler to
feature actor as object references; what reaches the coordinator is features, numbers per image, codes item by item, and
the tiles of the grids. All of it is added in the order of the indices, so the metrics are the same for 1 or 8 actors.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
from ray.util.placement_group import PlacementGroup

from cluster.sampler_actor import SamplerActor
from evaluation.estimates import Estimate
from evaluation.feature_actor import FeatureActor
from evaluation.frechet import frechet_estimate
from evaluation.pool import ActorPool, run_items
from evaluation.reference import StoredReference, load_reference, store_reference
from evaluation.resources import actor_options
from evaluation.statistics import BlockStatistics
from evaluation.tally import HoldoutTally, Item, SampleTally
from pipeline.sources import Source
from stages.errors import TesseraError
from stages.options import EvaluationOptions, ImageOptions, SamplingOptions

DISTANCE_THREADS = 2


@dataclass(frozen=True, eq=False, kw_only=True)
class Assignment:
    """Everything one evaluation needs, checked and chosen beforehand.

    Attributes:
        reference_key: of the reference statistics, and `reference_uris` the training images they are made from.
        holdout_uris: m held-out images, with `holdout_labels` int64 (m,), -1 where there is none.
        num_features, metric_prefix: of the extractor.
        codebook_size, num_codes: of the tokenizer, and codes per image.
    """

    checkpoint_path: str
    tokenizer_path: str
    sampling: SamplingOptions
    images: ImageOptions
    evaluation: EvaluationOptions
    source: Source
    reference_key: str
    reference_uris: list[str]
    holdout_uris: list[str]
    holdout_labels: np.ndarray
    num_features: int
    metric_prefix: str
    codebook_size: int
    num_codes: int


@dataclass(frozen=True, eq=False, kw_only=True)
class Measurement:
    """What one evaluation measured.

    Attributes:
        metrics: estimates by name.
        grids: PNG files by name: samples, real, reconstructions; `layouts` says by name what stands where in them.
        reference: the statistics the distances were measured against.
        num_unusable: held-out images that could not be decoded and were left out.
        wall_seconds: by phase: `start` of the first actors, then `working`, in which sampling runs beside reference
            and holdout, then `distance`.
    """

    metrics: dict[str, Estimate]
    grids: dict[str, bytes]
    layouts: dict[str, dict[str, Any]]
    reference: StoredReference
    num_unusable: int
    wall_seconds: dict[str, float]


class EvaluationActor:
    """One evaluation. Made an actor with `max_concurrency=2`, so that `progress` answers while `measure` runs.

    Args:
        assignment: what to evaluate.
        group: places for the sampler and feature actors, from `evaluation.resources.reserved`.
    """

    def __init__(self, assignment: Assignment, group: PlacementGroup):
        self.assignment = assignment
        self._done: dict[str, int] = {}
        self._seconds: dict[str, float] = {}
        options = assignment.evaluation
        placed = actor_options(options, group)
        feature_class = ray.remote(**placed)(FeatureActor)
        sampler_class = ray.remote(**placed)(SamplerActor)
        a = assignment
        self.features = ActorPool(
            "feature",
            lambda: feature_class.remote(a.source, a.images, options, a.tokenizer_path),
            options.num_feature_actors,
        )
        self.samplers = ActorPool(
            "sampler",
            lambda: sampler_class.remote(a.checkpoint_path, a.tokenizer_path, a.sampling),
            options.num_sampler_actors,
        )

    def progress(self) -> dict[str, int]:
        """Images finished so far, by phase."""
        return dict(self._done)

    def measure(self) -> Measurement:
        """Measures everything. Called once: it ends with the end of all actors.

        Raises:
            TesseraError: actors keep dying, a file cannot be read, or too few real images can be used.
        """
        begin = time.monotonic()
        try:
            for pool in (self.samplers, self.features):
                pool.release(pool.acquire())
            self._seconds["start"] = time.monotonic() - begin
            samples, (stored, holdout) = in_parallel([self._samples, self._real_images], on_error=self._close)
        finally:
            self._close()
        self._seconds["working"] = time.monotonic() - begin - self._seconds["start"]
        prefix = self.assignment.metric_prefix
        sets = {f"{prefix}_holdout": holdout.real, f"r{prefix}": holdout.reconstructed, f"g{prefix}": samples.features}
        begin = time.monotonic()
        distances = {
            name: frechet_estimate(blocks.result(), stored.reference, DISTANCE_THREADS) for name, blocks in sets.items()
        }
        self._seconds["distance"] = time.monotonic() - begin
        return Measurement(
            metrics={**distances, **holdout.estimates(self.assignment.num_codes)},
            grids={**samples.grids(), **holdout.grids()},
            layouts={**samples.layouts(), **holdout.layouts()},
            reference=stored,
            num_unusable=holdout.num_unusable,
            wall_seconds=self._seconds,
        )

    def _samples(self) -> SampleTally:
        options = self.assignment.evaluation
        everything = [(0, options.num_samples)]
        ((_, labels),) = run_items(everything, lambda item, actors: actors[0].labels.remote(*item), [self.samplers], 1)
        tally = SampleTally(labels, self.assignment.num_features, options.num_blocks, options.num_grid_images)

        def submit(item: Item, actors: list[Any]) -> Any:
            sampler, extractor = actors
            return extractor.of_images.remote(sampler.images.remote(*item), tally.tiles_in(item))

        for item, (features, tiles) in self._run(
            "sampling", options.num_samples, submit, [self.samplers, self.features]
        ):
            tally.add(item, features, tiles)
        return tally

    def _real_images(self) -> tuple[StoredReference, HoldoutTally]:
        return self._reference(), self._holdout()

    def _reference(self) -> StoredReference:
        path, key = self.assignment.evaluation.path, self.assignment.reference_key
        stored = load_reference(path, key)
        if stored is not None:
            return stored
        uris, num_unusable = self.assignment.reference_uris, 0
        whole = BlockStatistics(1, self.assignment.num_features)

        def submit(item: Item, actors: list[Any]) -> Any:
            return actors[0].of_reference.remote(uris[slice(*item)])

        for _, (features, num_unusable_here) in self._run("reference", len(uris), submit, [self.features]):
            whole.add(features, np.zeros(len(features), np.int64))
            num_unusable += num_unusable_here
        (statistics,) = whole.result()
        if statistics.n < 2:
            raise TesseraError(
                f"{statistics.n} of {len(uris)} training images can be used, but a reference needs two. "
                "Check the source."
            )
        return store_reference(path, key, statistics, num_unusable)

    def _holdout(self) -> HoldoutTally:
        a, options = self.assignment, self.assignment.evaluation
        tally = HoldoutTally(
            a.holdout_labels, a.num_features, a.codebook_size, options.num_blocks, options.num_grid_images
        )

        def submit(item: Item, actors: list[Any]) -> Any:
            extractor, sampler = actors
            uris, labels = a.holdout_uris[slice(*item)], a.holdout_labels[slice(*item)]
            images, codes, usable_labels = extractor.of_holdout.options(num_returns=3).remote(
                uris, labels, tally.tiles_in(item)
            )
            return images, codes, sampler.nll.remote(codes, usable_labels)

        for item, (images, codes, nll) in self._run(
            "holdout", len(a.holdout_uris), submit, [self.features, self.samplers]
        ):
            tally.add(item, images, codes, nll)
        tally.check(minimum=2 * options.num_blocks)
        return tally

    def _run(
        self, phase: str, num_images: int, submit: Callable, pools: Sequence[ActorPool]
    ) -> Iterator[tuple[Item, Any]]:
        """`run_items` over so many images, timed and counted."""
        begin = time.monotonic()
        window = 2 * max(pool.size for pool in pools) + 1
        for item, result in run_items(self._items(num_images), submit, pools, window):
            yield item, result
            self._done[phase] = item[1]
        self._seconds[phase] = time.monotonic() - begin

    def _items(self, num_images: int) -> list[Item]:
        """Ranges of whole sampling groups, about `item_size` long."""
        group = self.assignment.sampling.group_size
        size = group * math.ceil(self.assignment.evaluation.item_size / group)
        return [(start, min(start + size, num_images)) for start in range(0, num_images, size)]

    def _close(self) -> None:
        self.features.close()
        self.samplers.close()


def in_parallel(functions: Sequence[Callable[[], Any]], on_error: Callable[[], None]) -> list[Any]:
    """Results of functions run in threads. The first exception is raised, after `on_error` has made the others end."""
    with ThreadPoolExecutor(len(functions)) as threads:
        futures = [threads.submit(function) for function in functions]
        done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        if any(future.exception() for future in done):
            on_error()
        for future in done:
            future.result()
        return [future.result() for future in futures]
