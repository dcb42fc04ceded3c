"""Room on the cluster for an evaluation: all of its actors at once, or none.

An evaluation beside a training job must not take half of its places and wait for the rest while the other job waits for
the half it took, so a placement group reserves them together. An actor that is replaced gets its predecessor's place.
"""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from pipeline.shard_jobs import share_per_actor
from stages.errors import TesseraError
from stages.options import EvaluationOptions

logger = logging.getLogger(__name__)

NOTICE_SECONDS = 30.0


def bundle(options: EvaluationOptions) -> dict[str, float]:
    """Resources of one actor: as asked for, else one CPU, and one GPU where there are any; equal shares of too few."""
    num_actors = options.num_sampler_actors + options.num_feature_actors
    cpus = options.cpus_per_actor if options.cpus_per_actor is not None else share_per_actor("CPU", num_actors) or 1.0
    gpus = options.gpus_per_actor if options.gpus_per_actor is not None else share_per_actor("GPU", num_actors)
    wanted = {"CPU": cpus, "GPU": gpus} | ({options.actor_resource: 1.0} if options.actor_resource else {})
    return {name: amount for name, amount in wanted.items() if amount > 0}


@contextmanager
def reserved(options: EvaluationOptions) -> Iterator[PlacementGroup]:
    """A placement group with a bundle for every actor of an evaluation, for a `with` statement.

    Raises:
        TesseraError: the cluster had no room for it within `evaluation.start_timeout_seconds`.
    """
    one, num_actors = bundle(options), options.num_sampler_actors + options.num_feature_actors
    group = placement_group([one] * num_actors, strategy=options.placement_strategy)
    try:
        _wait(group, one, num_actors, options)
        yield group
    finally:
        remove_placement_group(group)


def _wait(group: PlacementGroup, one: dict[str, float], num_actors: int, options: EvaluationOptions) -> None:
    deadline = time.monotonic() + options.start_timeout_seconds
    while not group.wait(min(NOTICE_SECONDS, max(deadline - time.monotonic(), 0.1))):
        text = (
            f"The evaluation needs {num_actors} times {_amounts(one)}, but the cluster has {_amounts(ray.cluster_resources(), one)}, "
            f"of which {_amounts(ray.available_resources(), one)} free"
        )
        if time.monotonic() >= deadline:
            raise TesseraError(
                f"{text}, and that did not change in evaluation.start_timeout_seconds = {options.start_timeout_seconds:g}. Start "
                "it when there is room, lower evaluation.num_sampler_actors, num_feature_actors or cpus_per_actor, or add nodes."
            )
        logger.warning("%s: waiting", text)


def _amounts(amounts: dict[str, float], names: Any = None) -> str:
    return ", ".join(f"{amounts.get(name, 0):g} {name}" for name in names or amounts)


def actor_options(options: EvaluationOptions, group: PlacementGroup) -> dict[str, Any]:
    """Ray options of a sampler or feature actor in a place of the group.

    Nothing is restarted or repeated by Ray: the pools do that, with a bound. Calls may overtake each other: one whose
    images are still being drawn must not hold up the next.
    """
    one = dict(group.bundle_specs[0])
    return {
        "num_cpus": one.pop("CPU"),
        "num_gpus": one.pop("GPU", 0),
        "resources": one,
        "max_restarts": 0,
        "max_task_retries": 0,
        "allow_out_of_order_execution": True,
        "scheduling_strategy": PlacementGroupSchedulingStrategy(group),
    }
