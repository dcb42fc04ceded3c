"""The tokenize job on Ray Data: CPU tasks read and decode shards, an actor pool encodes and commits them.

The unit of work is a shard of the frozen plan. A task that is retried or run twice meets the receipt of the first and
changes nothing, so a killed job is run again and does only what is missing.
"""

import io
import logging
import math
from dataclasses import dataclass
from typing import Any

import pyarrow.parquet as pq
import ray

from pipeline import storage
from pipeline.code_dataset.codec import num_bits
from pipeline.code_dataset.compact import MAX_PART_BYTES, file_bytes_per_row
from pipeline.code_dataset.garbage import collect_garbage
from pipeline.code_dataset.manifest import is_published, read_manifest, row_format_of
from pipeline.code_dataset.parts import RowFormat
from pipeline.code_dataset.plan import Plan, freeze, make_plan
from pipeline.code_dataset.publish import publish, total_counts
from pipeline.code_dataset.receipts import read_receipts
from pipeline.encoding import numeric_mode, prepare_tokenizer
from pipeline.inputs import check_fit, check_maps, input_channels, input_spec, needed_maps
from pipeline.lineage import lineage
from pipeline.probe import freeze_probe
from pipeline.shard_jobs import encode_missing_shards, map_on_ray
from pipeline.shard_tasks import ShardJob
from pipeline.sources import Source, list_split, open_source
from pipeline.tokenizers import open_tokenizer
from pipeline.views import expand_views
from stages.config import to_dict, to_yaml
from stages.errors import ArtefactError, ConfigError, TesseraError
from stages.first_stage.tokenizer import Tokenizer
from stages.options import CodesOptions, ImageOptions, SourceOptions, TokenizerOptions

logger = logging.getLogger(__name__)

NUM_EXAMPLES = 3
MAX_SHARD_BYTES = 2 << 30  # of one Arrow block in the object store


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
    source = open_source(options.source, options.images, needed_maps(options.tokenizer, options.codes.conditions))
    listing = list_split(source, options.source, options.source.split)
    check_maps(source, listing["uri"], options.tokenizer, options.codes.conditions)
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
    tokenizer = prepare_tokenizer(tokenizer, next(tokenizer.parameters()).device)
    probe = freeze_probe(root, plan.fingerprint, tokenizer, options.codes)
    description = {**_description(options, plan, tokenizer), "probe": probe}
    job = ShardJob(
        source=source,
        images=options.images,
        codes=options.codes,
        views=tuple(plan.identity["views"]),
        grid=tokenizer.grid(options.images.size),
        row_format=row_format_of(description),
        plan_fingerprint=plan.fingerprint,
        plan_images=ray.put(plan.images),
        tokenizer=options.tokenizer,
        tokenizer_fingerprint=tokenizer.fingerprint,
        probe=probe,
    )
    encode_missing_shards(job, plan.num_shards)
    receipts = read_receipts(root, plan.fingerprint, plan.num_shards)
    check_quarantine(root, receipts, options.codes.max_quarantined_fraction)
    publish(
        root,
        receipts,
        description,
        drop_duplicates=options.codes.drop_duplicates,
        remap_unused=options.codes.remap_unused,
        row_group_rows=options.codes.row_group_rows,
        run=map_on_ray,
    )


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
    check_fit(tokenizer.config, images, options.tokenizer)
    num_bits(tokenizer.codebook_size)
    if codes.row_group_rows is not None and codes.row_group_rows.bit_count() != 1:
        raise ConfigError(
            f"codes.row_group_rows is {codes.row_group_rows}, but a row is found by a shift. Use a power of two, such as "
            f"{1 << codes.row_group_rows.bit_length()}."
        )
    most = _most_group_rows(tokenizer, options)
    if (codes.row_group_rows or 1) > most:
        raise ConfigError(
            f"codes.row_group_rows is {codes.row_group_rows}, but so many rows are more than the {MAX_PART_BYTES / 1e6:.0f} MB of a part, "
            f"which holds whole row groups. Use at most {most}."
        )
    views = expand_views(images.views)
    image_bytes = len(views) * images.size**2 * input_channels(images, options.tokenizer)
    if codes.shard_size * image_bytes > MAX_SHARD_BYTES:
        raise ConfigError(
            f"codes.shard_size is {codes.shard_size}, but the pixels of {len(views)} views of so many images are more than the "
            f"{MAX_SHARD_BYTES >> 30} GiB that one task hands on. Use at most {max(1, MAX_SHARD_BYTES // image_bytes)}."
        )
    return views


def _most_group_rows(tokenizer: Tokenizer, options: TokenizeOptions) -> int:
    """The largest power of two of rows, with labels, that a part has room for."""
    num_codes = math.prod(tokenizer.grid(options.images.size))
    rows = RowFormat(num_codes, tokenizer.codebook_size, has_labels=True, conditions=options.codes.conditions)
    return 1 << max(1, int(MAX_PART_BYTES / file_bytes_per_row(rows))).bit_length() - 1


def plan_identity(
    tokenizer: Tokenizer, options: TokenizeOptions, views: tuple[str, ...], class_names: tuple[str, ...]
) -> dict[str, Any]:
    """Everything but the images that decides what the rows are."""
    codes = options.codes
    return {
        "tokenizer": tokenizer.fingerprint,
        "preprocess": input_spec(options.images, options.tokenizer),
        "views": list(views),
        "conditions": list(codes.conditions),
        **_stored_numbers(options),
        "class_names": list(class_names),
        "codebook_size": tokenizer.codebook_size,
        "encode": numeric_mode(codes),
        "layout": {name: getattr(codes, name) for name in ("drop_duplicates", "remap_unused", "row_group_rows")},
    }


def _stored_numbers(options: TokenizeOptions) -> dict[str, list[str]]:
    """Which stored maps are of numbers, where the source is told so: the same file is another map as labels."""
    names = [entry.partition("=")[0] for entry in options.source.number_maps]
    stored = [name for name in options.codes.conditions if name in names]
    return {"number_maps": stored} if stored else {}


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
        f"({kinds}), such as {examples}. Every one is listed under {storage.join(root, 'quarantine')}. Raise the fraction to go on "
        f"without them; or let them be there as they were listed, and remove the receipts of the same numbers under "
        f"{storage.join(root, 'receipts')}; or mend or remove them, and use another codes.path."
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
            "num_codes": math.prod(tokenizer.grid(options.images.size)),
            "codebook_size": tokenizer.codebook_size,
        },
        "lineage": lineage(),
    }
