"""A tokenize job's work on Ray: the missing shards of a plan through Ray Data, and anything else by item in Ray tasks.

CPU tasks read and decode shards, an actor pool encodes and commits them. A task that is retried or run twice meets the receipt
of the first and changes nothing.
"""

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import ray
import ray.data

from pipeline.code_dataset.receipts import finished_shards
from pipeline.progress import Progress
from pipeline.shard_tasks import ShardEncoder, ShardJob, decode_shard

logger = logging.getLogger(__name__)

SHARDS_PER_DECODER = 100
SMALL_MAP, MAP_CHUNK = 16, 16
SHARE_UNITS = 10_000  # Ray counts resources in ten-thousandths


def encode_missing_shards(job: ShardJob, num_shards: int) -> None:
    """Encodes and commits every shard of a plan that has no receipt."""
    done = finished_shards(job.codes.path, job.plan_fingerprint)
    missing = [shard for shard in range(num_shards) if shard not in done]
    logger.info("%d of %d shards are missing", len(missing), num_shards)
    if not missing:
        return
    context = ray.data.DataContext.get_current().copy()
    context.target_max_block_size = None  # a shard's pixels stay one block, so an encoder always sees a whole shard
    context.enable_progress_bars = False
    with ray.data.DataContext.current(context):
        shards = ray.data.from_items([{"shard": shard} for shard in missing], override_num_blocks=len(missing))
        decoded = shards.map_batches(
            decode_shard,  # type: ignore[arg-type]  # Ray's annotations know no Arrow tables
            batch_size=None,
            batch_format="pyarrow",
            fn_kwargs={"job": job},
            max_calls=shards_per_decoder(job.codes.num_encoder_actors),
        )
        committed = decoded.map_batches(
            ShardEncoder,
            batch_size=1,  # a row is a shard; where GPUs are asked for, Ray Data takes no whole blocks
            batch_format="pyarrow",
            num_cpus=1,
            num_gpus=share_per_actor("GPU", job.codes.num_encoder_actors),
            compute=ray.data.ActorPoolStrategy(size=job.codes.num_encoder_actors),
            fn_constructor_kwargs={"job": job},
        )
        _wait(committed, len(missing))


def shards_per_decoder(num_encoder_actors: int) -> int | None:
    """Shards that a process decodes before a fresh one takes its place; None for no such limit.

    The limit keeps decoding in processes of its own: where both ask Ray for the same, Ray Data moves decoding into the
    encoders' processes, to alternate with encoding. Where encoders hold every CPU, nothing else could run, so there it may.
    """
    has_other_cpus = ray.cluster_resources().get("CPU", 0.0) > num_encoder_actors
    return SHARDS_PER_DECODER if has_other_cpus else None


def share_per_actor(name: str, num_actors: int) -> float:
    """How much of a resource, CPU or GPU, each of so many actors takes: one, or what lets the fewest share each of too few.

    Ray takes a share out of one GPU, and out of the CPUs of one node. So three actors take halves of two GPUs: only two would
    have room if each took two thirds. 0 in a cluster without the resource.
    """
    num_units = int(ray.cluster_resources().get(name, 0.0))
    if num_units == 0:
        return 0.0
    actors_per_unit = math.ceil(num_actors / num_units)
    return SHARE_UNITS // actors_per_unit / SHARE_UNITS


def _wait(committed: ray.data.Dataset, num_missing: int) -> None:
    """Runs the job to its end."""
    progress = Progress("missing shards", num_missing, logger)
    for batch in committed.iter_batches(batch_size=None, batch_format="pyarrow"):
        progress.advance(len(batch))


def map_on_ray(function: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
    """`map` in Ray tasks; in this process where there is little to do."""
    if len(items) <= SMALL_MAP:
        return list(map(function, items))
    chunks = [items[i : i + MAP_CHUNK] for i in range(0, len(items), MAP_CHUNK)]
    apply: Any = ray.remote(lambda chunk: list(map(function, chunk)))
    return [result for results in ray.get([apply.remote(chunk) for chunk in chunks]) for result in results]
