"""The tokenize job on Ray Data: CPU tasks read and decode shards, an actor pool encodes and commits them.

The unit of work is a shard of the frozen plan. A task that is retried or run twice meets the receipt of the first and
changes nothing, so a killed job is run again and does only what is missing.
"""

import io
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow.parquet as pq
import ray
import ray.data

from pipeline import storage
from pipeline.code_dataset.codec import num_bits
from pipeline.code_dataset.garbage import collect_garbage
from pipeline.code_dataset.manifest import is_published, read_manifest
from pipeline.code_dataset.parts import RowFormat
from pipeline.code_dataset.plan import Plan, freeze, make_plan
from pipeline.code_dataset.publish import publish, total_counts
from pipeline.code_dataset.receipts import finished_shards, read_receipts
from pipeline.encoding import numeric_mode, prepare_encoder
from pipeline.lineage import lineage
from pipeline.probe import freeze_probe
from pipeline.progress import Progress
from pipeline.shard_tasks import ShardEncoder, ShardJob, decode_shard
from pipeline.sources import Source, open_source
from pipeline.tokenizers import open_tokenizer
from pipeline.views import expand_views, preprocessing_spec
from stages.config import to_dict, to_yaml
from stages.errors import ArtefactError, BadImage, ConfigError, TesseraError
from stages.first_stage.tokenizer import Tokenizer
from stages.options import CodesOptions, ImageOptions, SourceOptions, TokenizerOptions

logger = logging.getLogger(__name__)

NUM_EXAMPLES = 3
SHARDS_PER_DECODER = 100
MAX_SHARD_BYTES = 2 << 30  # of one Arrow block in the object store
NUM_TRIED = 100  # images that are tried for one that can be decoded
SMALL_MAP, MAP_CHUNK = 16, 16


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
        ConfigError: an empty source, or images, views, conditions or a codebook that do not fit. Nothing is written.
        ArtefactError: no tokenizer, a folder that holds another code dataset, or a machine that encodes otherwise.
        TesseraError: more images are unusable than `codes.max_quarantined_fraction` allows; nothing is published.
    """
    tokenizer = open_tokenizer(options.tokenizer.path)
    views = check_images(tokenizer, options)
    source = open_source(options.source, options.images)
    listing = source.list_images("train")
    check_conditions(source, listing["uri"].to_pylist(), options.codes.conditions)
    plan = make_plan(listing, plan_identity(tokenizer, options, views, source.class_names), options.codes.shard_size)
    root = options.codes.path
    storage.check_conditional_put(root)
    freeze(root, plan)
    storage.put_if_absent(storage.join(root, "config.yaml"), to_yaml(options).encode())
    if not is_published(root):
        _write(options, plan, source, tokenizer)
    summary = _summary(root, plan)
    collect_garbage(root)
    return summary


def _write(options: TokenizeOptions, plan: Plan, source: Source, tokenizer: Tokenizer) -> None:
    """Encodes what is missing and publishes it."""
    root = options.codes.path
    tokenizer = prepare_encoder(tokenizer, next(tokenizer.parameters()).device)
    probe = freeze_probe(root, plan.fingerprint, tokenizer, options.codes)
    _encode_missing_shards(options, plan, source, tokenizer, probe)
    receipts = read_receipts(root, plan.fingerprint, plan.num_shards)
    check_quarantine(root, receipts, options.codes.max_quarantined_fraction)
    publish(
        root,
        receipts,
        {**_description(options, plan, tokenizer), "probe": probe},
        drop_duplicates=options.codes.drop_duplicates,
        remap_unused=options.codes.remap_unused,
        row_group_rows=options.codes.row_group_rows,
        run=_map_on_ray,
    )


def _map_on_ray(function: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
    """`map` in Ray tasks; in this process where there is little to do."""
    if len(items) <= SMALL_MAP:
        return list(map(function, items))
    chunks = [items[i : i + MAP_CHUNK] for i in range(0, len(items), MAP_CHUNK)]
    apply: Any = ray.remote(lambda chunk: list(map(function, chunk)))
    return [result for results in ray.get([apply.remote(chunk) for chunk in chunks]) for result in results]


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


def check_images(tokenizer: Tokenizer, options: TokenizeOptions) -> tuple[str, ...]:
    """Refuses images, views, rows and codebooks that do not fit each other; returns the names of the stored views.

    Raises:
        ConfigError: naming the key.
    """
    images, codes = options.images, options.codes
    if images.channels != tokenizer.config.in_channels:
        raise ConfigError(
            f"images.channels is {images.channels}, but the tokenizer in {options.tokenizer.path} takes "
            f"{tokenizer.config.in_channels}. Use the same number."
        )
    if images.size % tokenizer.downsample:
        raise ConfigError(
            f"images.size is {images.size}, but the tokenizer's patches are {tokenizer.downsample} pixels wide. Use a multiple."
        )
    num_bits(tokenizer.codebook_size)
    if codes.row_group_rows is not None and codes.row_group_rows.bit_count() != 1:
        raise ConfigError(
            f"codes.row_group_rows is {codes.row_group_rows}, but a row is found by a shift. Use a power of two, such as "
            f"{1 << codes.row_group_rows.bit_length()}."
        )
    views = expand_views(images.views)
    image_bytes = len(views) * images.size**2 * images.channels
    if codes.shard_size * image_bytes > MAX_SHARD_BYTES:
        raise ConfigError(
            f"codes.shard_size is {codes.shard_size}, but the pixels of {len(views)} views of so many images are more than the "
            f"{MAX_SHARD_BYTES >> 30} GiB that one task hands on. Use at most {max(1, MAX_SHARD_BYTES // image_bytes)}."
        )
    return views


def check_conditions(source: Source, uris: Sequence[str], names: Sequence[str]) -> None:
    """Refuses conditions that the source's images do not have, as far as its first usable image tells.

    Raises:
        ConfigError: naming what there is.
    """
    if not names:
        return
    for uri in uris[:NUM_TRIED]:
        try:
            example = source.decode(source.fetch(uri))
        except (BadImage, FileNotFoundError):
            continue
        maps = [name for name, values in example.conditions.items() if values.shape == example.image.shape[:2]]
        unknown = [name for name in names if name not in maps]
        if unknown:
            raise ConfigError(
                f"codes.conditions is {list(names)}, but {unknown[0]} is no map of this source's images, which have: "
                f"{', '.join(maps) or 'none'}. Choose from these."
            )
        return


def plan_identity(
    tokenizer: Tokenizer, options: TokenizeOptions, views: tuple[str, ...], class_names: tuple[str, ...]
) -> dict[str, Any]:
    """Everything but the images that decides what the rows are."""
    codes = options.codes
    return {
        "tokenizer": tokenizer.fingerprint,
        "preprocess": preprocessing_spec(options.images),
        "views": list(views),
        "conditions": list(codes.conditions),
        "class_names": list(class_names),
        "codebook_size": tokenizer.codebook_size,
        "encode": numeric_mode(codes),
        "layout": {name: getattr(codes, name) for name in ("drop_duplicates", "remap_unused", "row_group_rows")},
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


def _row_format(options: TokenizeOptions, plan: Plan, tokenizer: Tokenizer) -> RowFormat:
    h, w = tokenizer.grid(options.images.size)
    return RowFormat(
        num_codes=h * w,
        codebook_size=tokenizer.codebook_size,
        has_labels=bool(plan.identity["class_names"]),
        conditions=tuple(plan.identity["conditions"]),
    )


def _description(options: TokenizeOptions, plan: Plan, tokenizer: Tokenizer) -> dict[str, Any]:
    identity = plan.identity
    return {
        "plan_fp": plan.fingerprint,
        "source": {**to_dict(options.source), "n_input": len(plan.images)},
        **{name: identity[name] for name in ("class_names", "conditions", "views", "preprocess", "encode")},
        "grid": list(tokenizer.grid(options.images.size)),
        "tokenizer": {
            "fingerprint": tokenizer.fingerprint,
            "config": to_dict(tokenizer.config),
            "downsample": tokenizer.downsample,
        },
        "codec": {
            "name": "pack_le",
            "num_codes": _row_format(options, plan, tokenizer).num_codes,
            "codebook_size": tokenizer.codebook_size,
        },
        "lineage": lineage(),
    }


def _encode_missing_shards(
    options: TokenizeOptions, plan: Plan, source: Source, tokenizer: Tokenizer, probe: dict[str, Any]
) -> None:
    done = finished_shards(options.codes.path, plan.fingerprint)
    missing = [shard for shard in range(plan.num_shards) if shard not in done]
    logger.info("%d of %d shards are missing", len(missing), plan.num_shards)
    if not missing:
        return
    job = ShardJob(
        source=source,
        images=options.images,
        codes=options.codes,
        views=tuple(plan.identity["views"]),
        grid=tokenizer.grid(options.images.size),
        row_format=_row_format(options, plan, tokenizer),
        plan_fingerprint=plan.fingerprint,
        plan_images=ray.put(plan.images),
        tokenizer_path=options.tokenizer.path,
        tokenizer_fingerprint=tokenizer.fingerprint,
        probe=probe,
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
    """Runs the job to its end."""
    progress = Progress("missing shards", num_missing, logger)
    for batch in committed.iter_batches(batch_size=None, batch_format="pyarrow"):
        progress.advance(len(batch))
