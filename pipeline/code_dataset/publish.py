"""Publishing: shards become parts, counts must add up, and one put-if-absent version file makes it the dataset's content."""

import logging
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from pipeline import storage
from pipeline.code_dataset.compact import (
    Compaction,
    MapFunction,
    find_duplicates,
    plan_compaction,
    survey_shards,
    write_parts,
)
from pipeline.code_dataset.layout import (
    FORMAT,
    FORMAT_VERSION,
    canonical_json,
    manifest_path,
    plan_path,
    sha256_hex,
    version_path,
)
from pipeline.code_dataset.manifest import counts_add_up, is_published, root_hash, row_format_of
from pipeline.code_dataset.parts import CODES, DUPLICATES_SCHEMA, IMAGE_ID, LABEL, VIEW, RowFormat, encode_rows
from pipeline.code_dataset.receipts import put_content
from stages.errors import ArtefactError

logger = logging.getLogger(__name__)


def total_counts(receipts: Sequence[dict[str, Any]], num_views: int, num_dropped: int = 0) -> dict[str, Any]:
    """Sums of the receipts' counts: n_input = n_images + quarantined + dropped, n_rows = n_images * num_views."""
    kinds: Counter[str] = Counter()
    for receipt in receipts:
        kinds.update(receipt["counts"]["n_quarantined"])
    num_images = sum(receipt["counts"]["n_images"] for receipt in receipts) - num_dropped
    return {
        "n_input": sum(receipt["counts"]["n_input"] for receipt in receipts),
        "n_images": num_images,
        "n_rows": num_images * num_views,
        "n_quarantined": dict(kinds),
        "n_dedup_dropped": num_dropped,
    }


def publish(
    root: str,
    receipts: Sequence[dict[str, Any]],
    description: dict[str, Any],
    *,
    drop_duplicates: bool = False,
    remap_unused: bool = False,
    row_group_rows: int | None = None,
    run: MapFunction = map,
) -> None:
    """Writes parts, manifest, and the version file that makes them the dataset's content. An earlier version file stays.

    Others may publish the same dataset at the same time and remove its shards; then this changes nothing.

    Args:
        root: of the dataset.
        receipts: of every shard, in order, with at least one image.
        description: plan_fp, source, class_names, conditions, views, grid, tokenizer, preprocess, encode, codec, probe, lineage;
            codec and encode as the tokenizer wrote them.
        drop_duplicates: leave out images whose bytes are those of an earlier one.
        remap_unused: number the codebook entries that occur densely, so that fewer bits may hold them.
        row_group_rows: rows per row group, a power of two; chosen by size if not given.
        run: like `map`; spreads work over machines.

    Raises:
        ArtefactError: a shard's part is missing or damaged, and nothing is published.
    """
    try:
        manifest = _write_content(
            root,
            receipts,
            description,
            drop_duplicates=drop_duplicates,
            remap_unused=remap_unused,
            row_group_rows=row_group_rows,
            run=run,
        )
    except ArtefactError:
        if not is_published(root):
            raise
        logger.info("Another job published %s first and removed its shards", root)
    else:
        _commit(root, manifest)


def _write_content(
    root: str,
    receipts: Sequence[dict[str, Any]],
    description: dict[str, Any],
    *,
    drop_duplicates: bool,
    remap_unused: bool,
    row_group_rows: int | None,
    run: MapFunction,
) -> dict[str, Any]:
    """Writes the files that a version rests on; returns its manifest."""
    plan_fp, num_views = description["plan_fp"], len(description["views"])
    shards = [receipt["part"] for receipt in receipts if receipt["part"] is not None]
    stored = row_format_of(description)
    surveys = survey_shards(root, shards, stored, num_views, run)
    duplicates = find_duplicates(surveys)
    compaction = plan_compaction(
        root,
        plan_fp,
        shards,
        surveys,
        stored,
        num_views=num_views,
        dropped=frozenset(row["image_id"] for row in duplicates) if drop_duplicates else frozenset(),
        remap_unused=remap_unused,
        row_group_rows=row_group_rows,
    )
    parts, histogram = write_parts(compaction, run)
    counts = total_counts(receipts, num_views, len(compaction.dropped)) | {"n_duplicates": len(duplicates)}
    assert counts_add_up(counts, num_views, parts)
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "dataset_id": plan_fp[:16],
        "version": 1,
        "parent": None,
        **description,
        "counts": counts,
        "codec": description["codec"] | _codec(compaction),
        "columns": _columns(compaction.published, description["grid"]),
        "plan_sha256": sha256_hex(storage.read_bytes(plan_path(root, plan_fp))),
        "receipts_sha256": [sha256_hex(canonical_json(receipt)) for receipt in receipts],
        "encoders": _encoders(receipts),
        "parts": parts,
        "quarantine": [receipt["quarantine"] for receipt in receipts if receipt["quarantine"] is not None],
        "duplicates": _put_duplicates(root, plan_fp, duplicates),
        "stats": statistics(histogram),
        "root_hash": root_hash(parts),
    }


def _codec(compaction: Compaction) -> dict[str, Any]:
    """How codes are packed and, where unused codebook entries are left out, the code that each stored number stands for."""
    codec: dict[str, Any] = {
        "bits": compaction.published.bits,
        "bytes_per_row": compaction.published.bytes_per_row,
        "row_group_rows": compaction.row_group_rows,
    }
    if compaction.original is not None:
        codec["remap"] = compaction.original.tolist()
        codec["remap_sha256"] = sha256_hex(compaction.original.astype("<u2").tobytes())
    return codec


def _put_duplicates(root: str, plan_fp: str, duplicates: list[dict[str, Any]]) -> dict[str, Any] | None:
    if not duplicates:
        return None
    data = encode_rows(duplicates, DUPLICATES_SCHEMA)
    return {**put_content(root, "duplicates", plan_fp, 0, data), "rows": len(duplicates)}


def _commit(root: str, manifest: dict[str, Any]) -> None:
    data = canonical_json(manifest)
    digest = sha256_hex(data)
    storage.put_if_absent(manifest_path(root, digest), data)
    version = {"manifest_sha256": digest, "parent": None, "root_hash": manifest["root_hash"], "created_at": time.time()}
    storage.put_if_absent(
        version_path(root, 1), canonical_json({**version, "sha256": sha256_hex(canonical_json(version))})
    )


def _columns(row_format: RowFormat, grid: Sequence[int]) -> list[dict[str, Any]]:
    roles = {IMAGE_ID: "key", VIEW: "key", LABEL: "label", CODES: "codes"}
    roles |= {name: "condition" for name in row_format.conditions}
    columns = []
    for name in row_format.schema.names:
        column: dict[str, Any] = {"name": name, "role": roles.get(name, "crop")}
        if name in row_format.addressed:
            column["bytes"] = row_format.addressed[name]
        if column["role"] in ("codes", "condition"):
            column |= {"bits": row_format.bits if name == CODES else 8, "shape": list(grid)}
        columns.append(column)
    return columns


def _encoders(receipts: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The machines and libraries that made the codes, each with its number of shards."""
    counts = Counter(canonical_json(receipt["encoder"]) for receipt in receipts)
    by_text = {canonical_json(receipt["encoder"]): receipt["encoder"] for receipt in receipts}
    return [{**by_text[text], "num_shards": count} for text, count in sorted(counts.items())]


def statistics(histogram: np.ndarray) -> dict[str, Any]:
    """How often each code occurs, as a hash, with the number used and their entropy in bits per code."""
    shares = histogram[histogram > 0] / max(1, histogram.sum())
    return {
        "used_codes": int((histogram > 0).sum()),
        "entropy_bits_per_code": float(-(shares * np.log2(shares)).sum()),
        "code_histogram_sha256": sha256_hex(histogram.astype("<i8").tobytes()),
    }
