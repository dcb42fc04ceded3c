"""The tokenize job on Ray Data: CPU tasks read and decode a shard, an actor pool encodes and commits it.

The unit of work is a shard of the frozen plan. A task that is retried or run twice meets the receipt of the first and changes
nothing, so a killed job is run again and does only what is missing.
"""

import hashlib
import logging
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data
import torch

from pipeline import storage
from pipeline.code_dataset.codec import bytes_per_row, num_bits
from pipeline.code_dataset.parts import PartRows
from pipeline.code_dataset.plan import Plan, freeze, make_plan
from pipeline.code_dataset.publish import publish, total_counts
from pipeline.code_dataset.reader import read_manifest
from pipeline.code_dataset.receipts import commit_shard, finished_shards, read_receipts
from pipeline.images import apply_view, preprocessing_spec
from pipeline.sources import open_source
from pipeline.tokenizers import open_tokenizer
from stages.config import to_dict, to_yaml
from stages.errors import ArtefactError, BadImage, ConfigError, TesseraError
from stages.first_stage.pixels import to_float
from stages.first_stage.tokenizer import Tokenizer
from stages.options import CodesOptions, ImageOptions, SourceOptions, TokenizerOptions

logger = logging.getLogger(__name__)

READ_ATTEMPTS = 4
READ_RETRY_SECONDS = 1.0


@dataclass(frozen=True, kw_only=True)
class TokenizeOptions:
    """The sections that `tokenize` takes."""

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
        ConfigError: an empty source or views that do not exist.
        ArtefactError: no tokenizer, or a folder that holds another code dataset.
        TesseraError: more images are unusable than `codes.max_quarantined_fraction` allows; nothing is published.
    """
    tokenizer = open_tokenizer(options.tokenizer.path)
    check_images(tokenizer, options)
    source = open_source(options.source, options.images)
    root = options.codes.path
    storage.check_conditional_put(root)
    plan = make_plan(source.list_images("train"), plan_identity(tokenizer, options), options.codes.shard_size)
    freeze(root, plan)
    storage.put_if_absent(storage.join(root, "config.yaml"), to_yaml(options).encode())
    if not storage.list_files(storage.join(root, "versions")):
        _encode_missing_shards(options, plan, source, tokenizer.fingerprint)
        receipts = read_receipts(root, plan.fingerprint)
        check_quarantine(receipts, plan, options.codes.max_quarantined_fraction)
        publish(root, receipts, _description(options, plan, tokenizer, source.class_names))
    manifest = read_manifest(root)
    return TokenizeSummary(
        dataset=root,
        root_hash=manifest["root_hash"],
        num_rows=manifest["counts"]["n_rows"],
        num_quarantined=sum(manifest["counts"]["n_quarantined"].values()),
        bytes_per_row=manifest["codec"]["bytes_per_row"],
    )


def check_images(tokenizer: Tokenizer, options: TokenizeOptions) -> None:
    """Refuses images that the tokenizer cannot take."""
    images = options.images
    if images.channels != tokenizer.config.in_channels:
        raise ConfigError(
            f"images.channels is {images.channels}, but the tokenizer in {options.tokenizer.path} takes {tokenizer.config.in_channels}. "
            f"Use the same number."
        )
    if images.size % tokenizer.downsample:
        raise ConfigError(f"images.size is {images.size}, but it must be a multiple of {tokenizer.downsample}, the tokenizer's patch side.")


def plan_identity(tokenizer: Tokenizer, options: TokenizeOptions) -> dict[str, Any]:
    """Everything but the images that decides what the codes are."""
    return {
        "tokenizer": tokenizer.fingerprint,
        "preprocess": preprocessing_spec(options.images),
        "views": list(options.images.views),
        "codebook_size": tokenizer.codebook_size,
        "encode_precision": options.codes.encode_precision,
        "encode_batch_size": options.codes.encode_batch_size,
    }


def check_quarantine(receipts: list[dict[str, Any]], plan: Plan, max_fraction: float) -> None:
    """Fails the job when too many images were unusable, with counts and where to look."""
    counts = total_counts(receipts, num_views=1)
    num_bad = sum(counts["n_quarantined"].values())
    if num_bad > max_fraction * counts["n_input"] or counts["n_images"] == 0:
        kinds = ", ".join(f"{kind} {count}" for kind, count in sorted(counts["n_quarantined"].items()))
        files = [receipt["quarantine"]["path"] for receipt in receipts if receipt["quarantine"]][:3]
        raise TesseraError(
            f"codes.max_quarantined_fraction is {max_fraction}, but {num_bad} of {counts['n_input']} images are unusable ({kinds}). "
            f"Look at {', '.join(files)}; mend the images or raise the fraction."
        )


def _description(options: TokenizeOptions, plan: Plan, tokenizer: Tokenizer, class_names: tuple[str, ...]) -> dict[str, Any]:
    grid = tokenizer.grid(options.images.size)
    num_codes, bits = grid[0] * grid[1], num_bits(tokenizer.codebook_size)
    return {
        "plan_fp": plan.fingerprint,
        "source": {**to_dict(options.source), "n_input": len(plan.images)},
        "class_names": list(class_names),
        "views": list(options.images.views),
        "grid": list(grid),
        "tokenizer": {"fingerprint": tokenizer.fingerprint, "config": to_dict(tokenizer.config), "downsample": tokenizer.downsample},
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


def _encode_missing_shards(options: TokenizeOptions, plan: Plan, source: Any, fingerprint: str) -> None:
    done = finished_shards(options.codes.path, plan.fingerprint)
    missing = [shard for shard in range(plan.num_shards) if shard not in done]
    logger.info("%d of %d shards are missing", len(missing), plan.num_shards)
    if not missing:
        return
    context = ray.data.DataContext.get_current().copy()
    context.target_max_block_size = None  # a shard's pixels stay one block, so an encoder always sees a whole shard
    context.enable_progress_bars = False
    with ray.data.DataContext.current(context):
        images = ray.put(plan.images)
        dataset = ray.data.from_items([{"shard": shard} for shard in missing], override_num_blocks=len(missing))
        decoded = dataset.map_batches(
            _decode_shard, batch_size=None, batch_format="pyarrow", fn_kwargs={"images": images, "source": source, "options": options}
        )
        encoded = decoded.map_batches(
            _ShardEncoder,
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=1,
            compute=ray.data.ActorPoolStrategy(size=options.codes.num_encoder_actors),
            fn_constructor_kwargs={"options": options, "plan_fingerprint": plan.fingerprint, "fingerprint": fingerprint},
        )
        started, num_done = time.monotonic(), 0
        for batch in encoded.iter_batches(batch_size=None, batch_format="pyarrow"):
            num_done += len(batch)
            rate = num_done / (time.monotonic() - started)
            logger.info("Shard %d of %d, ETA %.0f s", len(done) + num_done, plan.num_shards, (len(missing) - num_done) / rate)


def _decode_shard(table: pa.Table, images: Any, source: Any, options: TokenizeOptions) -> pa.Table:
    """Reads and decodes one shard: a row per image, with the pixels of all its views or with what is wrong with it."""
    (shard,) = table["shard"].to_pylist()
    rows = ray.get(images).filter(pc.field("shard") == shard).to_pylist()
    return pa.Table.from_pylist([_decode_image(row, source, options) for row in rows], schema=_decoded_schema(options.images))


def _decoded_schema(images: ImageOptions) -> pa.Schema:
    num_bytes = len(images.views) * images.size**2 * images.channels
    texts = [(name, pa.string()) for name in ("uri", "stage", "kind", "message", "sha256")]
    numbers = [("shard", pa.int32()), ("image_id", pa.int64()), ("label", pa.int32())]
    return pa.schema([*numbers, *texts, ("pixels", pa.binary(num_bytes))])


def _decode_image(row: dict[str, Any], source: Any, options: TokenizeOptions) -> dict[str, Any]:
    data, stage = b"", "fetch"
    try:
        data = fetch(source, row["uri"])
        stage = "decode"
        image = source.decode(data).image
        views = [apply_view(image, view, options.images) for view in options.images.views]
    except BadImage as error:
        fault = {"stage": stage, "kind": error.kind, "message": error.message, "sha256": hashlib.sha256(data).hexdigest()}
        return {**row, **fault, "pixels": None}
    return {**row, "stage": None, "kind": None, "message": None, "sha256": None, "pixels": np.stack(views).tobytes()}


def fetch(source: Any, uri: str) -> bytes:
    """An image's bytes. A file that is not there is that image's fault; any other storage fault is retried and then raised.

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


class _ShardEncoder:
    """Encodes, packs and commits one shard per call."""

    def __init__(self, options: TokenizeOptions, plan_fingerprint: str, fingerprint: str):
        self.options, self.plan_fingerprint = options, plan_fingerprint
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        self.tokenizer = open_tokenizer(options.tokenizer.path).to(self.device)
        if self.tokenizer.fingerprint != fingerprint:
            raise ArtefactError(
                f"tokenizer.path is {options.tokenizer.path} with fingerprint {self.tokenizer.fingerprint} here, but the plan was made with "
                f"{fingerprint}. Let every machine see the same tokenizer."
            )

    def __call__(self, table: pa.Table) -> pa.Table:
        (shard,) = set(table["shard"].to_pylist())
        good = table.filter(pc.is_valid(table["pixels"]))
        bad = table.filter(pc.is_null(table["pixels"]))
        num_views = len(self.options.images.views)
        labels = good["label"].to_numpy() if good["label"].null_count == 0 else None
        rows = PartRows(
            codes=self._encode(good["pixels"]),
            image_ids=good["image_id"].to_numpy().repeat(num_views),
            views=np.tile(np.arange(num_views, dtype=np.int32), len(good)),
            labels=None if labels is None else labels.repeat(num_views),
        )
        quarantined = bad.select(["image_id", "uri", "stage", "kind", "message", "sha256"]).to_pylist()
        bits = num_bits(self.tokenizer.codebook_size)
        commit_shard(self.options.codes.path, self.plan_fingerprint, shard, rows, quarantined, bits, num_views)
        return pa.table({"shard": pa.array([shard], pa.int32())})

    @torch.inference_mode()
    def _encode(self, pixels: pa.ChunkedArray) -> np.ndarray:
        """Codes of all views, int64 (images * views, L), in batches of one fixed shape whatever the shard holds."""
        images, size = self.options.images, self.options.codes.encode_batch_size
        h, w = self.tokenizer.grid(images.size)
        flat = np.frombuffer(b"".join(pixels.to_pylist()), np.uint8)
        views = flat.reshape(-1, images.size, images.size, images.channels)
        codes = [np.zeros((0, h * w), np.int64)]
        for start in range(0, len(views), size):
            batch = np.zeros((size, *views.shape[1:]), np.uint8)
            part = views[start : start + size]
            batch[: len(part)] = part
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.options.codes.encode_precision == "bf16"):
                encoded = self.tokenizer.encode(to_float(torch.from_numpy(batch).to(self.device)))
            codes.append(encoded[: len(part)].cpu().numpy())
        return np.concatenate(codes)
