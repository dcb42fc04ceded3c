"""The evaluation actor: coordinates sampler actors and feature actors and adds up what they return.

Work items are ranges of image indices whose bounds do not depend on the number of actors. Images go from sampler to
feature actor as object references; what reaches the coordinator is features, numbers per image, codes item by item, and
the tiles of the grids. All of it is added in the order of the indices, so the metrics are the same for 1 or 8 actors.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
from ray.util.placement_group import PlacementGroup

from cluster.sampler_actor import SamplerActor
from evaluation.code_matches import TrainingCodes, code_match_estimates
from evaluation.estimates import Estimate
from evaluation.feature_actor import FeatureActor
from evaluation.metrics import FeatureKey, MetricPlan
from evaluation.pool import ActorPool, run_items
from evaluation.reference import StoredReference
from evaluation.reference_features import Call, ReferenceImages, kept_features, references_of, run_self_tests
from evaluation.resources import actor_options
from evaluation.set_metric import HOLDOUT, RECONSTRUCTIONS, SAMPLES
from evaluation.set_tally import SetTally, memorisation_estimates
from evaluation.tally import HoldoutTally, Item, SampleTally
from pipeline.sources import Source
from stages.memory import keep_freed_memory
from stages.options import EvaluationOptions, ImageOptions, SamplingOptions, TokenizerOptions


@dataclass(frozen=True, eq=False, kw_only=True)
class Assignment:
    """Everything one evaluation needs, checked and chosen beforehand.

    Attributes:
        checkpoint_path: whose samples are drawn; None to measure the tokenizer alone.
        tokenizer: where it is, and what of the images it reconstructs.
        plan: the metrics, and `widths` of the features they need.
        references: of features whose statistics a file of the user gives; of others there is a key in `reference_keys`,
            under which they are kept or made from the training images `reference_uris`.
        holdout_uris: m held-out images, with `holdout_labels` int64 (m,), -1 where there is none.
        codebook_size, num_codes: of the tokenizer, and codes per image.
        training_codes: what the codes of samples are compared with, where the plan has it.
        conditions_path: code dataset that samples are drawn for, of a checkpoint that is conditioned on codes.
        holdout_conditions: the codes (m, P) that such a checkpoint is given to score the held-out images.
    """

    checkpoint_path: str | None
    tokenizer: TokenizerOptions
    sampling: SamplingOptions
    images: ImageOptions
    evaluation: EvaluationOptions
    source: Source
    plan: MetricPlan
    widths: dict[FeatureKey, int]
    references: dict[FeatureKey, StoredReference]
    reference_keys: dict[FeatureKey, str]
    reference_uris: list[str]
    holdout_uris: list[str]
    holdout_labels: np.ndarray
    codebook_size: int
    num_codes: int
    training_codes: TrainingCodes | None = None
    conditions_path: str | None = None
    holdout_conditions: np.ndarray | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class Measurement:
    """What one evaluation measured.

    Attributes:
        metrics: estimates by name.
        grids: PNG files by name: samples, real, reconstructions; neighbours, the samples beside their nearest training
            images, if memorisation is measured; side_by_side for a tokenizer. `layouts` says by name what stands where
            in all but the last.
        references: what was measured against, by features.
        num_unusable: held-out images that could not be decoded and were left out.
        wall_seconds: by phase: `start` of the first actors, then `working`, in which sampling runs beside reference
            and holdout, then `neighbours`, then `distance`, which is all metrics.
    """

    metrics: dict[str, Estimate]
    grids: dict[str, bytes]
    layouts: dict[str, dict[str, Any]]
    references: dict[FeatureKey, StoredReference]
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
            lambda: feature_class.remote(a.source, a.images, options, a.plan, a.tokenizer),
            options.num_feature_actors,
        )
        self.samplers = ActorPool(
            "sampler",
            lambda: sampler_class.remote(
                a.checkpoint_path, a.tokenizer.path, a.sampling, conditions_path=a.conditions_path
            ),
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
        phases = [self._real_images, *([self._samples] if self.assignment.checkpoint_path else [])]
        begin = time.monotonic()
        try:
            for pool in (self.samplers, self.features):
                if pool.size:
                    pool.release(pool.acquire())
            self._seconds["start"] = time.monotonic() - begin
            (references, holdout), *drawn = in_parallel(phases, on_error=self._close)
            self._seconds["working"] = time.monotonic() - begin - self._seconds["start"]
            samples: SampleTally | None = drawn[0] if drawn else None
            if samples is not None:
                self._find_neighbours(samples, references)
        finally:
            self._close()
        begin = time.monotonic()
        keep_freed_memory()  # from here on: every distance of a jackknife makes the same large matrices anew
        metrics = self._estimates(samples, holdout, references)
        self._seconds["distance"] = time.monotonic() - begin
        extra = samples.grids() if samples is not None else {"side_by_side": holdout.side_by_side()}
        return Measurement(
            metrics=metrics,
            grids={**extra, **holdout.grids()},
            layouts={**(samples.layouts() if samples is not None else {}), **holdout.layouts()},
            references=references,
            num_unusable=holdout.num_unusable,
            wall_seconds=self._seconds,
        )

    def _samples(self) -> SampleTally:
        options = self.assignment.evaluation
        everything = [(0, options.num_samples)]
        ((_, labels),) = run_items(everything, lambda item, actors: actors[0].labels.remote(*item), [self.samplers], 1)
        classes = labels if labels.ndim == 1 else np.full(len(labels), -1)  # what is drawn for codes has no class
        tally = SampleTally(classes, self._metrics(SAMPLES, options.num_samples), options.num_grid_images)
        has_code_matches = self.assignment.plan.has_code_matches

        def submit(item: Item, actors: list[Any]) -> tuple[Any, ...]:
            sampler, extractor = actors
            if not has_code_matches:
                return (extractor.of_images.remote(sampler.images.remote(*item), tally.tiles_in(item)),)
            images, codes = sampler.images_and_codes.options(num_returns=2).remote(*item)
            return extractor.of_images.remote(images, tally.tiles_in(item)), codes

        pools = [self.samplers, self.features]
        for item, (found, *codes) in self._run("sampling", options.num_samples, submit, pools):
            tally.add(item, *found, *codes)
        return tally

    def _find_neighbours(self, samples: SampleTally, references: Mapping[FeatureKey, StoredReference]) -> None:
        """Adds the grid of samples beside their nearest training images, if memorisation is measured."""
        begin = time.monotonic()
        uris = {p: self.assignment.reference_uris[i] for p, i in samples.nearest_training(references).items()}
        if not uris:
            return
        wanted, pictures = list(dict.fromkeys(uris.values())), dict[str, np.ndarray]()

        def submit(item: Item, actors: list[Any]) -> Any:
            return actors[0].pictures.remote(wanted[slice(*item)])

        for _, found in self._run("neighbours", len(wanted), submit, [self.features]):
            pictures.update(found)
        samples.add_neighbours({position: pictures.get(uri) for position, uri in uris.items()})
        self._seconds["neighbours"] = time.monotonic() - begin

    def _estimates(
        self, samples: SampleTally | None, holdout: HoldoutTally, references: Mapping[FeatureKey, StoredReference]
    ) -> dict[str, Estimate]:
        a = self.assignment
        sets = [holdout.real, holdout.reconstructed, *([samples.metrics] if samples else [])]
        against = {key: stored.reference for key, stored in references.items()}
        metrics = {name: estimate for each in sets for name, estimate in each.estimates(against).items()}
        if samples is not None:
            metrics |= memorisation_estimates(samples.metrics, holdout.real)
        if samples is not None and a.training_codes is not None:
            training = a.training_codes.choose(a.evaluation.num_pairwise_images)
            metrics |= code_match_estimates(samples.metrics.codes(), holdout.real.codes(), training)
        return metrics | holdout.estimates(a.num_codes)

    def _metrics(self, image_set: str, num_images: int) -> SetTally:
        a = self.assignment
        options = a.evaluation
        return SetTally(
            image_set, a.plan, a.widths, num_images, options.num_blocks, pairwise_limit=options.num_pairwise_images
        )

    def _real_images(self) -> tuple[dict[FeatureKey, StoredReference], HoldoutTally]:
        a = self.assignment
        images = ReferenceImages(
            path=a.evaluation.path,
            uris=a.reference_uris,
            num_kept={key: kept_features(a.plan, key, a.evaluation) for key in a.reference_keys},
        )
        made = references_of(images, a.reference_keys, a.widths, self._run_reference)
        return {**self._given_references(), **made}, self._holdout()

    def _given_references(self) -> dict[FeatureKey, StoredReference]:
        """Those of `evaluation.reference_path`, once their extractors are tested, and the extractors that need no reference too: those
        of references that are made here are tested when these are."""
        a = self.assignment
        tested = {name for name, _ in a.reference_keys}
        untested = [*a.references, *(key for key in a.plan.features() if key not in a.references and key[0] not in tested)]
        tests = run_self_tests(a.holdout_uris, untested, self._run_reference) if untested else {}
        return {key: dataclasses.replace(stored, self_test=tests.get(key)) for key, stored in a.references.items()}

    def _run_reference(self, num_images: int, call: Callable[[Item], Call]) -> Iterator[tuple[Item, Any]]:
        def submit(item: Item, actors: list[Any]) -> Any:
            method, arguments = call(item)
            return getattr(actors[0], method).remote(*arguments)

        return self._run("reference", num_images, submit, [self.features])

    def _holdout(self) -> HoldoutTally:
        a = self.assignment
        num_images, is_scored = len(a.holdout_uris), a.plan.has_likelihood
        tally = HoldoutTally(
            a.holdout_labels,
            self._metrics(HOLDOUT, num_images),
            self._metrics(RECONSTRUCTIONS, num_images),
            a.plan,
            a.codebook_size,
            a.evaluation.num_grid_images,
        )

        given = a.holdout_labels if a.holdout_conditions is None else a.holdout_conditions

        def submit(item: Item, actors: list[Any]) -> Any:
            uris, labels = a.holdout_uris[slice(*item)], given[slice(*item)].astype(np.int64)
            images, codes, usable_labels = (
                actors[0].of_holdout.options(num_returns=3).remote(uris, labels, tally.tiles_in(item))
            )
            return (images, codes, actors[1].nll.remote(codes, usable_labels)) if is_scored else (images, codes)

        pools = [self.features, self.samplers] if is_scored else [self.features]
        for item, results in self._run("holdout", num_images, submit, pools):
            tally.add(item, *results)
        tally.check(minimum=2 * a.evaluation.num_blocks)
        return tally

    def _run(
        self, phase: str, num_images: int, submit: Callable, pools: Sequence[ActorPool]
    ) -> Iterator[tuple[Item, Any]]:
        """`run_items` over so many images, timed and counted."""
        begin = time.monotonic()
        window = 2 * max(pool.size for pool in pools) + 1
        for item, result in run_items(self._items(num_images), submit, pools, window):
            yield item, result
            self._done[phase] = max(item[1], self._done.get(phase, 0))
        self._seconds[phase] = self._seconds.get(phase, 0.0) + time.monotonic() - begin

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
