"""What Ray Data runs per shard of a plan: a task that reads and decodes its images, an actor that encodes and commits them."""

import hashlib
import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
import torch

from pipeline.code_dataset.parts import QUARANTINE_SCHEMA, RowFormat, byte_rows, make_rows
from pipeline.code_dataset.receipts import commit_shard
from pipeline.encoding import encode_views, machine, prepare_tokenizer
from pipeline.fetch import MISSING, fetch
from pipeline.inputs import input_channels, render_stored, render_views
from pipeline.probe import check_probe
from pipeline.sources import Source
from pipeline.tokenizers import open_tokenizer
from pipeline.views import crop_of
from stages.errors import ArtefactError, BadImage, StorageError
from stages.memory import keep_freed_memory
from stages.options import CodesOptions, ImageOptions, TokenizerOptions

CROP_FLOATS = 5  # left, top, width, height, mirrored


@dataclass(frozen=True, kw_only=True)
class ShardJob:
    """What all shards of a job share. `images` and `codes` are its options; `plan_images` refers to the plan's table."""

    source: Source
    images: ImageOptions
    codes: CodesOptions
    views: tuple[str, ...]
    grid: tuple[int, int]
    row_format: RowFormat
    plan_fingerprint: str
    plan_images: Any
    tokenizer: TokenizerOptions
    tokenizer_fingerprint: str
    probe: dict[str, Any]

    @property
    def decoded_schema(self) -> pa.Schema:
        """Of a decoded shard's images: null in `pixels`, `crops` and conditions where one cannot be used."""
        num_views = len(self.views)
        texts = [(name, pa.string()) for name in ("uri", "stage", "kind", "message", "sha256")]
        numbers = [("shard", pa.int32()), ("image_id", pa.int64()), ("label", pa.int32())]
        arrays = {
            "pixels": num_views * self.images.size**2 * input_channels(self.images, self.tokenizer),
            "crops": num_views * CROP_FLOATS * 4,
            **{name: num_views * self.row_format.num_codes for name in self.row_format.conditions},
        }
        return pa.schema([*numbers, *texts, *((name, pa.binary(size)) for name, size in arrays.items())])


def decode_shard(table: pa.Table, job: ShardJob) -> pa.Table:
    """Reads and decodes one shard.

    Args:
        table: one row with the shard's number.
        job: the job.

    Returns:
        One row again, so that Ray Data never cuts or joins shards: `shard`, and in `images` a list of `decoded_schema`'s rows, each
        with the pixels, crops and condition maps of all views of an image, or with what is wrong with it.

    Raises:
        StorageError: no image of several is there: it is their place that this machine does not have.
        OSError: storage kept failing.
    """
    (shard,) = table["shard"].to_pylist()
    rows = ray.get(job.plan_images).filter(pc.field("shard") == shard)
    decoded = [_decode_image(row, job) for row in rows.select(["shard", "image_id", "uri", "label"]).to_pylist()]
    if len(decoded) > 1 and all(image.get("kind") == MISSING for image in decoded):
        raise StorageError(
            f"{decoded[0]['uri']} is listed, but neither it nor any other of the {len(decoded)} images of shard {shard} is there on "
            f"{os.uname().nodename}. Let every machine see the images, or list only those that are there."
        )
    images = pa.Table.from_pylist(decoded, schema=job.decoded_schema).to_struct_array().combine_chunks()
    return pa.table(
        {"shard": pa.array([shard], pa.int32()), "images": pa.ListArray.from_arrays([0, len(images)], images)}
    )


def _decode_image(row: dict[str, Any], job: ShardJob) -> dict[str, Any]:
    data, stage = b"", "fetch"
    try:
        data = fetch(job.source, row["uri"])
        stage = "decode"
        example = job.source.decode(data)
        crops = [crop_of(view, row["image_id"], *example.image.shape[:2]) for view in job.views]
        conditions = {name: render_stored(example, name, crops, job.grid).tobytes() for name in job.row_format.conditions}
        pixels = render_views(example, crops, job.images, job.tokenizer, row["uri"])
    except BadImage as error:
        digest = hashlib.sha256(data).hexdigest()
        return {**row, "stage": stage, "kind": error.kind, "message": error.message, "sha256": digest}
    boxes = np.array([(c.left, c.top, c.width, c.height, c.is_flipped) for c in crops], np.float32)
    digest = hashlib.sha256(data).hexdigest()
    return {**row, "sha256": digest, "pixels": pixels.tobytes(), "crops": boxes.tobytes(), **conditions}


class ShardEncoder:
    """Encodes, packs and commits one decoded shard per call. Uses the GPU that Ray gave it, if it gave one.

    Raises:
        ArtefactError: this machine sees another tokenizer than the plan was made with, or gives other codes.
    """

    def __init__(self, job: ShardJob):
        self.job = job
        keep_freed_memory()
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.tokenizer = prepare_tokenizer(open_tokenizer(job.tokenizer.path), self.device)
        if self.tokenizer.fingerprint != job.tokenizer_fingerprint:
            raise ArtefactError(
                f"tokenizer.path is {job.tokenizer.path} with fingerprint {self.tokenizer.fingerprint} here, but the plan "
                f"was made with {job.tokenizer_fingerprint}. Let every machine see the same tokenizer."
            )
        check_probe(self.tokenizer, job.codes, job.probe, job.codes.path)

    def __call__(self, table: pa.Table) -> pa.Table:
        (shard,) = table["shard"].to_pylist()
        images = pa.Table.from_struct_array(table["images"].chunk(0).flatten())
        good, bad = images.filter(pc.is_valid(images["pixels"])), images.filter(pc.is_null(images["pixels"]))
        commit_shard(
            self.job.codes.path,
            self.job.plan_fingerprint,
            shard,
            rows=self._rows(good),
            quarantined=bad.select(QUARANTINE_SCHEMA.names).to_pylist(),
            row_format=self.job.row_format,
            num_views=len(self.job.views),
            encoder=machine(self.device),
        )
        return pa.table({"shard": pa.array([shard], pa.int32())})

    def _rows(self, good: pa.Table) -> pa.Table:
        job, n, num_views = self.job, len(good), len(self.job.views)
        size, channels = job.images.size, input_channels(job.images, job.tokenizer)

        def per_view(name: str) -> np.ndarray:
            width = job.decoded_schema.field(name).type.byte_width
            return byte_rows(good[name], width).reshape(n * num_views, width // num_views)

        pixels = per_view("pixels").reshape(-1, size, size, channels)
        boxes = per_view("crops").view(np.float32)
        hashes = [bytes.fromhex(digest) for digest in good["sha256"].to_pylist()]
        return make_rows(
            job.row_format,
            codes=encode_views(self.tokenizer, pixels, job.codes, job.tokenizer.num_labels),
            image_ids=good["image_id"].to_numpy().repeat(num_views),
            views=np.tile(np.arange(num_views), n),
            crops=boxes[:, :4],
            is_flipped=boxes[:, 4] > 0,
            source_sha256=np.frombuffer(b"".join(hashes), np.uint8).reshape(n, 32).repeat(num_views, axis=0),
            labels=good["label"].fill_null(-1).to_numpy().repeat(num_views) if job.row_format.has_labels else None,
            conditions={name: per_view(name) for name in job.row_format.conditions},
        )
