"""The plan: which images, in which order, split into which shards. Frozen before work starts and named by all that decides the codes."""

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.code_dataset.layout import canonical_json, plan_path, sha256_hex
from stages.errors import ArtefactError


@dataclass(frozen=True)
class Plan:
    """A frozen plan.

    Attributes:
        fingerprint: sha-256 of the identity and the rows.
        identity: everything else that decides the codes (tokenizer, preprocessing, views, codec, precision, batch size).
        images: table of image_id int64, uri string, label int32 (nullable), shard int32, in plan order.
    """

    fingerprint: str
    identity: dict[str, Any]
    images: pa.Table

    @property
    def num_shards(self) -> int:
        return self.images["shard"][-1].as_py() + 1

    @property
    def has_labels(self) -> bool:
        return self.images["label"].null_count == 0

    def shard(self, shard: int) -> pa.Table:
        """The images of one shard, in plan order."""
        return self.images.filter(pc.field("shard") == shard)


def make_plan(listing: pa.Table, identity: dict[str, Any], shard_size: int) -> Plan:
    """Splits a listing into consecutive shards of `shard_size` images.

    The name covers ids, uris, labels and, where the source knows them, sizes and entity tags: a source that changed gives another plan.
    """
    shards = np.arange(len(listing)) // shard_size
    names = [name for name in ("image_id", "uri", "label", "num_bytes", "etag") if name in listing.column_names]
    rows = sha256_hex("\n".join(canonical_json(row).decode() for row in listing.select(names).to_pylist()).encode())
    images = listing.select(["image_id", "uri", "label"]).append_column("shard", pa.array(shards, pa.int32()))
    return Plan(sha256_hex(canonical_json({**identity, "rows": rows, "shard_size": shard_size})), identity, images)


def freeze(root: str, plan: Plan) -> None:
    """Stores the plan.

    Raises:
        ArtefactError: the folder belongs to another plan.
    """
    present = {path.split("/")[-2] for path in storage.list_files(storage.join(root, "plans"), suffix="plan.parquet")}
    if present - {plan.fingerprint}:
        raise ArtefactError(
            f"codes.path is {root}, which holds a code dataset of plan {', '.join(sorted(present))}, but this job's plan is {plan.fingerprint}: "
            f"its images, tokenizer or preprocessing differ. Use another codes.path."
        )
    buffer = io.BytesIO()
    metadata = {b"identity": canonical_json(plan.identity)}
    pq.write_table(plan.images.replace_schema_metadata(metadata), buffer, write_page_checksum=True)
    storage.put_if_absent(plan_path(root, plan.fingerprint), buffer.getvalue())
