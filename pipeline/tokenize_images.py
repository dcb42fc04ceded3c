"""The tokenize job on Ray Data: CPU tasks read and decode shards, an actor pool encodes and commits them.

The unit of work is a shard of the frozen plan. A task that is retried or run twice meets the receipt of the first and
changes nothing, so a killed job is run again and does only what is missing.
"""

import io
import logging
import time
from dataclasses import dataclass
from typing import Any

import pyarrow.parquet as pq
import ray
import ray.data

from pipeline import storage
from pipeline.code_dataset.codec import bytes_per_row, num_bits
from pipeline.code_dataset.plan import Plan, freeze, make_plan
from pipeline.code_dataset.publish import publish, total_counts
from pipeline.code_dataset.reader import read_manifest
from pipeline.code_dataset.receipts import finished_shards, read_receipts
from pipeline.images import VIEWS, preprocessing_spec
from pipeline.shard_tasks import ShardEncoder, ShardJob, decode_shard
from pipeline.sources import Source, open_source
from pipeline.tokenizers import open_tokenizer
from stages.config import to_dict, to_yaml
from stages.errors import ArtefactError, ConfigError, TesseraError
from stages.first_stage.tokenizer import Tokenizer
from stages.options import CodesOptions, ImageOptions, SourceOptions, TokenizerOptions

logger = logging.getLogger(__name__)

LOG_SECONDS = 5.0
NUM_EXAMPLES = 3
SHARDS_PER_DECODER = 100


@dataclass(frozen=True, kw_only=True)
class TokenizeOptions:
    """The sections that `tokenize` takes. Paths are absolute: Ray workers run in folders of their own."""

    source: SourceOptions
    images: ImageOptions
    tokenizer: TokenizerOptions
    codes: CodesOptions


@dataclass(frozen=True, kw_only=True)
class TokenizeSummary:
    """What `tokenize` reports."""

    dataset: str
    root_hash: str
    num_rows: int
    num_quarantined: int
    bytes_per_row: int


def tokenize(options: TokenizeOptions) -> TokenizeSummary:
    """Writes the code dataset of a source, or what is missing of it. Ray must be connected.

    Raises:
        ConfigError: an empty source, or images, views or a codebook that do not fit. Nothing is written.
        ArtefactError: no tokenizer, or a folder that holds another code dataset.
        TesseraError: more images are unusable than `codes.max_quarantined_fraction` allows; nothing is published.
    """
    tokenizer = open_tokenizer(options.tokenizer.path)
    check_images(tokenizer, options)
    source = open_source(options.source, options.images)
    plan = make_plan(
        source.list_images("train"), plan_identity(tokenizer, options, source.class_names), options.codes.shard_size
    )
    root = options.codes.path
    storage.check_conditional_put(root)
    freeze(root, plan)
    storage.put_if_absent(storage.join(root, "config.yaml"), to_yaml(options).encode())
    if not storage.list_files(storage.join(root, "versions")):
        _encode_missing_shards(options, plan, source, tokenizer.fingerprint)
        receipts = read_receipts(root, plan.fingerprint, plan.num_shards)
        check_quarantine(root, receipts, options.codes.max_quarantined_fraction)
        publish(root, receipts, _description(options, plan, tokenizer))
    return _summary(root, plan)


def _summary(root: str, plan: Plan) -> TokenizeSummary:
    manifest = read_manifest(root)
    if manifest["plan_fp"] != plan.fingerprint:
        raise ArtefactError(
            f"codes.path is {root}, which holds a code dataset of plan {manifest['plan_fp']}, but this job's plan is "
            f"{plan.fingerprint}. Use another codes.path."
        )
    return TokenizeSummary(
        dataset=root,
        root_hash=manifest["root_hash"],
        num_rows=manifest["counts"]["n_rows"],
        num_quarantined=sum(manifest["counts"]["n_quarantined"].values()),
        bytes_per_row=manifest["codec"]["bytes_per_row"],
    )


def check_images(tokenizer: Tokenizer, options: TokenizeOptions) -> None:
    """Refuses images, views and codebooks that do not fit each other.

    Raises:
        ConfigError: naming the key.
    """
    images = options.images
    if images.channels != tokenizer.config.in_channels:
        raise ConfigError(
            f"images.channels is {images.channels}, but the tokenizer in {options.tokenizer.path} takes "
            f"{tokenizer.config.in_channels}. Use the same number."
        )
    if images.size % tokenizer.downsample:
        raise ConfigError(
            f"images.size is {images.size}, but the tokenizer's patches are {tokenizer.downsample} pixels wide. Use a multiple."
        )
    if not images.views or len(set(images.views)) < len(images.views) or not set(images.views) <= set(VIEWS):
        raise ConfigError(
            f"images.views is {list(images.views)}, but it must name at least one view, each once, of: {', '.join(VIEWS)}. "
            f"Choose from these."
        )
    num_bits(tokenizer.codebook_size)


def plan_identity(tokenizer: Tokenizer, options: TokenizeOptions, class_names: tuple[str, ...]) -> dict[str, Any]:
    """Everything but the images that decides what the rows are."""
    return {
        "tokenizer": tokenizer.fingerprint,
        "preprocess": preprocessing_spec(options.images),
        "views": list(options.images.views),
        "class_names": list(class_names),
        "codebook_size": tokenizer.codebook_size,
        "encode_precision": options.codes.encode_precision,
        "encode_batch_size": options.codes.encode_batch_size,
    }


def check_quarantine(root: str, receipts: list[dict[str, Any]], max_fraction: float) -> None:
    """Fails the job when too many images were unusable, with counts and examples.

    Raises:
        TesseraError: more than `max_fraction` of the images are quarantined, or all of them.
    """
    counts = total_counts(receipts, num_views=1)
    num_bad = sum(counts["n_quarantined"].values())
    if num_bad <= max_fraction * counts["n_input"] and counts["n_images"] > 0:
        return
    kinds = ", ".join(f"{kind} {count}" for kind, count in sorted(counts["n_quarantined"].items()))
    paths = [receipt["quarantine"]["path"] for receipt in receipts if receipt["quarantine"]]
    first = pq.read_table(io.BytesIO(storage.read_bytes(storage.join(root, paths[0]))))
    examples = ", ".join(first["uri"].to_pylist()[:NUM_EXAMPLES])
    raise TesseraError(
        f"codes.max_quarantined_fraction is {max_fraction}, but {num_bad} of {counts['n_input']} images are unusable "
        f"({kinds}), such as {examples}. Mend or remove them (every one is listed under {storage.join(root, 'quarantine')}), "
        f"or raise the fraction."
    )


def _description(options: TokenizeOptions, plan: Plan, tokenizer: Tokenizer) -> dict[str, Any]:
    grid = tokenizer.grid(options.images.size)
    num_codes, bits = grid[0] * grid[1], num_bits(tokenizer.codebook_size)
    return {
        "plan_fp": plan.fingerprint,
        "source": {**to_dict(options.source), "n_input": len(plan.images)},
        "class_names": plan.identity["class_names"],
        "views": plan.identity["views"],
        "grid": list(grid),
        "tokenizer": {
            "fingerprint": tokenizer.fingerprint,
            "config": to_dict(tokenizer.config),
            "downsample": tokenizer.downsample,
        },
        "preprocess": plan.identity["preprocess"],
        "encode": {"precision": options.codes.encode_precision, "batch_size": options.codes.encode_batch_size},
        "codec": {
            "name": "pack_le",
            "bits": bits,
            "bytes_per_row": bytes_per_row(num_codes, bits),
            "num_codes": num_codes,
            "codebook_size": tokenizer.codebook_size,
        },
    }


def _encode_missing_shards(options: TokenizeOptions, plan: Plan, source: Source, tokenizer_fingerprint: str) -> None:
    done = finished_shards(options.codes.path, plan.fingerprint)
    missing = [shard for shard in range(plan.num_shards) if shard not in done]
    logger.info("%d of %d shards are missing", len(missing), plan.num_shards)
    if not missing:
        return
    job = ShardJob(
        source=source,
        images=options.images,
        codes=options.codes,
        plan_fingerprint=plan.fingerprint,
        plan_images=ray.put(plan.images),
        tokenizer_path=options.tokenizer.path,
        tokenizer_fingerprint=tokenizer_fingerprint,
    )
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
            max_calls=shards_per_decoder(options.codes.num_encoder_actors),
        )
        committed = decoded.map_batches(
            ShardEncoder,
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=1,
            num_gpus=gpus_per_encoder(options.codes.num_encoder_actors),
            compute=ray.data.ActorPoolStrategy(size=options.codes.num_encoder_actors),
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


def gpus_per_encoder(num_encoder_actors: int) -> float:
    """An equal share of the cluster's GPUs for each encoder, at most one; 0 in a cluster without GPUs."""
    return min(1.0, ray.cluster_resources().get("GPU", 0.0) / num_encoder_actors)


def _wait(committed: ray.data.Dataset, num_missing: int) -> None:
    """Runs the job to its end, logging how far it is every few seconds."""
    started = logged = time.monotonic()
    num_done = 0
    for batch in committed.iter_batches(batch_size=None, batch_format="pyarrow"):
        num_done += len(batch)
        now = time.monotonic()
        if now - logged >= LOG_SECONDS or num_done == num_missing:
            left = (num_missing - num_done) * (now - started) / num_done
            logger.info("%d of %d missing shards done, about %.0f s left", num_done, num_missing, left)
            logged = now
