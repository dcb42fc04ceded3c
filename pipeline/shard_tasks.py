"""What Ray Data runs per shard of a plan: a task that reads and decodes its images, an actor that encodes and commits them."""

import hashlib
import logging
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
import torch

from pipeline.code_dataset.parts import QUARANTINE_SCHEMA, PartRows
from pipeline.code_dataset.receipts import commit_shard
from pipeline.images import apply_view
from pipeline.sources import Source
from pipeline.tokenizers import open_tokenizer
from stages.errors import ArtefactError, BadImage
from stages.first_stage.pixels import to_float
from stages.first_stage.tokenizer import Tokenizer
from stages.options import CodesOptions, ImageOptions

logger = logging.getLogger(__name__)

READ_ATTEMPTS = 4
READ_RETRY_SECONDS = 1.0


@dataclass(frozen=True, kw_only=True)
class ShardJob:
    """What all shards of a job share. `images` and `codes` are its options; `plan_images` refers to the plan's table."""

    source: Source
    images: ImageOptions
    codes: CodesOptions
    plan_fingerprint: str
    plan_images: Any
    tokenizer_path: str
    tokenizer_fingerprint: str


def decode_shard(table: pa.Table, job: ShardJob) -> pa.Table:
    """Reads and decodes one shard: a row per image, with the pixels of all its views or with what is wrong with it.

    Args:
        table: one row with the shard's number.
        job: the job.

    Returns:
        Columns shard, image_id, label, pixels (fixed-size binary, null for a bad image), and those of a quarantine row.

    Raises:
        OSError: storage kept failing.
    """
    (shard,) = table["shard"].to_pylist()
    rows = ray.get(job.plan_images).filter(pc.field("shard") == shard)
    decoded = [_decode_image(row, job) for row in rows.select(["shard", "image_id", "uri", "label"]).to_pylist()]
    return pa.Table.from_pylist(decoded, schema=_decoded_schema(job.images))


def _decoded_schema(images: ImageOptions) -> pa.Schema:
    num_bytes = len(images.views) * images.size**2 * images.channels
    texts = [(name, pa.string()) for name in ("uri", "stage", "kind", "message", "sha256")]
    numbers = [("shard", pa.int32()), ("image_id", pa.int64()), ("label", pa.int32())]
    return pa.schema([*numbers, *texts, ("pixels", pa.binary(num_bytes))])


def _decode_image(row: dict[str, Any], job: ShardJob) -> dict[str, Any]:
    data, stage = b"", "fetch"
    try:
        data = fetch(job.source, row["uri"])
        stage = "decode"
        image = job.source.decode(data).image
        views = [apply_view(image, view, job.images) for view in job.images.views]
    except BadImage as error:
        digest = hashlib.sha256(data).hexdigest()
        return {**row, "stage": stage, "kind": error.kind, "message": error.message, "sha256": digest}
    return {**row, "pixels": np.stack(views).tobytes()}


def fetch(source: Source, uri: str) -> bytes:
    """An image's bytes. A file that is not there is that image's fault; other storage faults are retried, then raised.

    Raises:
        BadImage: the listed image does not exist.
        OSError: storage kept failing.
    """
    for attempt in range(READ_ATTEMPTS):
        try:
            return source.fetch(uri)
        except FileNotFoundError as error:
            raise BadImage("missing", str(error)) from error
        except OSError as error:
            if attempt == READ_ATTEMPTS - 1:
                raise
            logger.warning("Reading %s failed (%s); trying again", uri, error)
            time.sleep(READ_RETRY_SECONDS * 2**attempt)
    raise AssertionError("unreachable")


class ShardEncoder:
    """Encodes, packs and commits one decoded shard per call. Uses the GPU that Ray gave it, if it gave one.

    Raises:
        ArtefactError: this machine sees another tokenizer than the plan was made with.
    """

    def __init__(self, job: ShardJob):
        self.job = job
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        self.tokenizer = open_tokenizer(job.tokenizer_path).to(self.device)
        if self.tokenizer.fingerprint != job.tokenizer_fingerprint:
            raise ArtefactError(
                f"tokenizer.path is {job.tokenizer_path} with fingerprint {self.tokenizer.fingerprint} here, but the plan "
                f"was made with {job.tokenizer_fingerprint}. Let every machine see the same tokenizer."
            )

    def __call__(self, table: pa.Table) -> pa.Table:
        (shard,) = set(table["shard"].to_pylist())
        good, bad = table.filter(pc.is_valid(table["pixels"])), table.filter(pc.is_null(table["pixels"]))
        num_views = len(self.job.images.views)
        views = _pixels(good, self.job.images)
        rows = PartRows(
            codes=encode_views(self.tokenizer, views, self.job.codes),
            image_ids=good["image_id"].to_numpy().repeat(num_views),
            views=np.tile(np.arange(num_views, dtype=np.int32), len(good)),
            labels=good["label"].fill_null(-1).to_numpy().repeat(num_views) if self.job.source.class_names else None,
        )
        commit_shard(
            self.job.codes.path,
            self.job.plan_fingerprint,
            shard,
            rows=rows,
            quarantined=bad.select(QUARANTINE_SCHEMA.names).to_pylist(),
            codebook_size=self.tokenizer.codebook_size,
            num_views=num_views,
        )
        return pa.table({"shard": pa.array([shard], pa.int32())})


def _pixels(table: pa.Table, images: ImageOptions) -> np.ndarray:
    flat = np.frombuffer(b"".join(table["pixels"].to_pylist()), np.uint8)
    return flat.reshape(-1, images.size, images.size, images.channels)


@torch.inference_mode()
def encode_views(tokenizer: Tokenizer, views: np.ndarray, options: CodesOptions) -> np.ndarray:
    """Codes of uint8 views (n, H, W, C), int64 (n, L), on the tokenizer's device.

    Every call of the encoder has one shape, whatever n is: the last batch is filled with black, so that codes of an image
    depend on its place in the shard and on nothing an attempt could change.
    """
    device = next(tokenizer.parameters()).device
    size = options.encode_batch_size
    h, w = tokenizer.grid(views.shape[1])
    codes = [np.zeros((0, h * w), np.int64)]
    for start in range(0, len(views), size):
        part = views[start : start + size]
        batch = np.zeros((size, *views.shape[1:]), np.uint8)
        batch[: len(part)] = part
        with torch.autocast(device.type, torch.bfloat16, enabled=options.encode_precision == "bf16"):
            encoded = tokenizer.encode(to_float(torch.from_numpy(batch).to(device)))
        codes.append(encoded[: len(part)].cpu().numpy())
    return np.concatenate(codes)
