"""The plan: which images, in which order, in which shards. Frozen before work starts, named by all that decides the codes."""

import hashlib
import io
import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.code_dataset.layout import canonical_json, claim_of, claim_path, plan_path, read_json, sha256_hex
from stages.errors import ArtefactError, ConfigError, StorageError

COLUMNS = ["image_id", "uri", "label", "num_bytes", "etag"]
IDENTITY = b"identity"


@dataclass(frozen=True)
class Plan:
    """A frozen plan.

    Attributes:
        identity: what decides the codes besides the images: tokenizer, preprocessing, views, classes, codebook, precision,
            batch size, shard size. JSON-able.
        images: table of image_id int64, uri string, label int32 (nullable), num_bytes int64 (nullable), etag string
            (nullable), shard int32, in plan order.
    """

    identity: dict[str, Any]
    images: pa.Table

    @cached_property
    def fingerprint(self) -> str:
        """sha-256 of the identity and of every row, sizes and entity tags included: a source that changed has another plan."""
        rows = hashlib.sha256()
        for batch in self.images.select(COLUMNS).to_batches():
            for row in batch.to_pylist():
                rows.update(canonical_json(row) + b"\n")
        return sha256_hex(canonical_json({**self.identity, "rows": rows.hexdigest()}))

    @property
    def num_shards(self) -> int:
        return self.images["shard"][-1].as_py() + 1


def make_plan(listing: pa.Table, identity: dict[str, Any], shard_size: int) -> Plan:
    """Splits a listing (columns as in `COLUMNS`) into consecutive shards of `shard_size` images.

    Raises:
        ConfigError: the listing is empty, or a label is no class of `identity["class_names"]`.
    """
    if len(listing) == 0:
        raise ConfigError("source has 0 images, but there must be at least one. Name a place with images.")
    num_classes = len(identity["class_names"])
    bounds = pc.min_max(listing["label"]).as_py()
    if num_classes and bounds["min"] is not None and not 0 <= bounds["min"] <= bounds["max"] < num_classes:
        raise ConfigError(
            f"source has labels from {bounds['min']} to {bounds['max']}, but it names {num_classes} classes, counted from 0. "
            f"Mend its labels."
        )
    shards = pa.array(np.arange(len(listing)) // shard_size, pa.int32())
    return Plan({**identity, "shard_size": shard_size}, listing.select(COLUMNS).append_column("shard", shards))


def freeze(root: str, plan: Plan) -> None:
    """Stores the plan. Of jobs with different plans that start in one new folder at the same time, one does.

    Raises:
        ArtefactError: the folder belongs to another plan, or holds a damaged one.
    """
    others = _claim(root, plan.fingerprint) - {plan.fingerprint}
    if others:
        raise ArtefactError(
            f"codes.path is {root}, which holds a code dataset of plan {', '.join(sorted(others))}, but this job's plan is "
            f"{plan.fingerprint}: its images, tokenizer or preprocessing differ. Use another codes.path."
        )
    buffer = io.BytesIO()
    metadata = {IDENTITY: canonical_json(plan.identity)}
    pq.write_table(plan.images.replace_schema_metadata(metadata), buffer, write_page_checksum=True)
    if not storage.put_if_absent(plan_path(root, plan.fingerprint), buffer.getvalue()):
        read_plan(root, plan.fingerprint)


def _claim(root: str, fingerprint: str) -> set[str]:
    """Plans that a folder belongs to: where it has none yet, that of the first to claim it."""
    path = claim_path(root)
    if not storage.exists(path):
        # What is listed may be outdated at once, so it only serves folders of earlier versions, which nobody had to claim.
        stored = {plan.split("/")[-2] for plan in storage.list_files(storage.join(root, "plans"), suffix="/plan.parquet")}
        if stored - {fingerprint}:
            return stored
        storage.put_if_absent(path, claim_of(fingerprint))
    return {read_json(path)["plan_fp"]}


def read_plan(root: str, fingerprint: str) -> Plan:
    """A stored plan, checked against its name.

    Raises:
        ArtefactError: missing or damaged.
    """
    path, images = plan_path(root, fingerprint), read_images(root, fingerprint)
    try:
        plan = Plan(json.loads(images.schema.metadata[IDENTITY]), images)
        found = plan.fingerprint
    except (KeyError, TypeError, ValueError) as error:
        raise ArtefactError(f"{path} is damaged ({error}). Restore it, or tokenize anew.") from None
    if found != fingerprint:
        raise ArtefactError(
            f"{path} is damaged: its fingerprint is {found}, not its name. Restore it, or tokenize anew."
        )
    return plan


def read_images(root: str, fingerprint: str) -> pa.Table:
    """`Plan.images` of a stored plan. Its pages are checked, but not its name, for which every row must be hashed.

    Raises:
        ArtefactError: missing or damaged.
    """
    path = plan_path(root, fingerprint)
    try:
        return pq.read_table(io.BytesIO(storage.read_bytes(path)), page_checksum_verification=True)
    except FileNotFoundError:
        raise ArtefactError(
            f"{path} is missing, but the code dataset needs it. Restore it, or tokenize anew."
        ) from None
    except StorageError:
        raise  # says itself what is wrong with the store
    except (OSError, ValueError) as error:
        raise ArtefactError(f"{path} is damaged ({error}). Restore it, or tokenize anew.") from None
