import dataclasses
import hashlib
import io
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from tests_support import TINY_TOKENIZER

from pipeline import shard_tasks
from pipeline.code_dataset.codec import unpack
from pipeline.code_dataset.compact import read_shard
from pipeline.code_dataset.parts import CROP_COLUMNS, SOURCE_SHA256, RowFormat, byte_rows
from pipeline.code_dataset.receipts import finished_shards, read_receipts
from pipeline.encoding import encode_views
from pipeline.probe import make_probe
from pipeline.shard_tasks import ShardEncoder, ShardJob, decode_shard
from pipeline.sources import Example, listing
from pipeline.tokenizers import open_tokenizer, store_tokenizer
from pipeline.views import crop_of, expand_views, render, render_map
from stages.errors import ArtefactError, BadImage, StorageError
from stages.first_stage.tokenizer import Tokenizer
from stages.options import CodesOptions, ImageOptions, TokenizerOptions

IMAGES = ImageOptions(size=16, views=("center", "flip", "random-crop:2"))
VIEWS = expand_views(IMAGES.views)


class Squares:
    """Wide pictures of random squares with two maps; `none` is no picture, and `plain` lacks a map."""

    class_names = ("a", "b")

    def fetch(self, uri):
        if uri.startswith("gone"):
            raise FileNotFoundError(uri)
        return uri.encode()

    def decode(self, data):
        if data == b"none":
            raise BadImage("undecodable", "no picture")
        random = np.random.default_rng(list(data))
        image = Image.fromarray(random.integers(0, 256, (3, 4, 3), dtype=np.uint8)).resize((32, 24), 0)
        segmentation, depth = random.integers(0, 9, (24, 32)).astype(np.uint8), random.random((24, 32), np.float32)
        conditions = {"segmentation": segmentation} | ({} if data == b"plain" else {"depth": depth})
        return Example(np.asarray(image), conditions)


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory):
    torch.manual_seed(0)
    path = str(tmp_path_factory.mktemp("tokenizer") / "tokenizer")
    store_tokenizer(Tokenizer(TINY_TOKENIZER), path)
    return path


@pytest.fixture
def job(tokenizer_path, tmp_path, monkeypatch):
    """Of a plan of two shards, in this process instead of Ray's."""
    monkeypatch.setattr(shard_tasks.ray, "get", lambda table: table)
    monkeypatch.setattr(shard_tasks, "keep_freed_memory", lambda: None)
    tokenizer, codes = open_tokenizer(tokenizer_path), CodesOptions(path=str(tmp_path / "codes"), encode_batch_size=8)
    uris = ["one", "none", "two", "gone", "three", "plain"]
    images = listing(np.arange(10, 16), uris, np.array([0, 1, 1, 0, 0, 1])).append_column(
        "shard", pa.array([0, 0, 0, 0, 1, 1], pa.int32())
    )
    return ShardJob(
        source=Squares(),
        images=IMAGES,
        codes=codes,
        views=VIEWS,
        grid=(8, 8),
        row_format=RowFormat(num_codes=64, codebook_size=32, has_labels=True, conditions=("segmentation", "depth")),
        plan_fingerprint="p",
        plan_images=images,
        tokenizer=TokenizerOptions(path=tokenizer_path),
        tokenizer_fingerprint=tokenizer.fingerprint,
        probe=make_probe(tokenizer, codes),
    )


def run(job, *shards):
    """Receipts of these shards."""
    encoder = ShardEncoder(job)
    for shard in shards:
        done = encoder(decode_shard(pa.table({"shard": [shard]}), job))
        assert done["shard"].to_pylist() == [shard]
    return read_receipts(job.codes.path, "p", len(shards))


def test_a_shard_holds_every_view_of_its_images(job):
    receipt, _ = run(job, 0, 1)
    rows = read_shard(job.codes.path, receipt["part"])
    assert rows["image_id"].to_pylist() == [10] * 4 + [12] * 4
    assert rows["view"].to_pylist() == [0, 1, 2, 3] * 2
    assert rows["label"].to_pylist() == [0] * 4 + [1] * 4
    examples = {10: Squares().decode(b"one"), 12: Squares().decode(b"two")}
    crops = [(image_id, crop_of(view, image_id, 24, 32)) for image_id in examples for view in VIEWS]
    found = [tuple(row[name] for name in CROP_COLUMNS) for row in rows.to_pylist()]
    expected = [(c.left, c.top, c.width, c.height, c.is_flipped) for _, c in crops]
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    pixels = np.stack([render(examples[i].image, crop, IMAGES) for i, crop in crops])
    codes = unpack(byte_rows(rows["codes"], 40), 64, 5)
    assert (codes == encode_views(open_tokenizer(job.tokenizer.path), pixels, job.codes)).mean() > 0.99
    for name in ("segmentation", "depth"):
        maps = np.stack([render_map(examples[i].conditions[name], crop, (8, 8)) for i, crop in crops])
        np.testing.assert_array_equal(byte_rows(rows[name], 64), maps.reshape(-1, 64))


def test_a_shard_knows_the_hash_of_the_bytes_of_each_image(job):
    (receipt,) = run(job, 0)
    digests = read_shard(job.codes.path, receipt["part"])[SOURCE_SHA256].to_pylist()
    assert digests == [hashlib.sha256(uri).digest() for uri in (b"one", b"two") for _ in VIEWS]


def test_images_that_cannot_be_used_are_quarantined(job):
    found = []
    for receipt in run(job, 0, 1):
        data = open(f"{job.codes.path}/{receipt['quarantine']['path']}", "rb").read()
        found += pq.read_table(io.BytesIO(data)).to_pylist()
    assert [(row["uri"], row["stage"], row["kind"]) for row in found] == [
        ("none", "decode", "undecodable"),
        ("gone", "fetch", "missing"),
        ("plain", "decode", "no-condition"),
    ]
    assert [row["sha256"] for row in found] == [hashlib.sha256(data).hexdigest() for data in (b"none", b"", b"plain")]


def test_a_shard_of_which_nothing_is_there_is_a_fault_of_its_place(job):
    uris = pa.array(["one", "two", "gone", "three", "gone", "gone too"])
    elsewhere = dataclasses.replace(job, plan_images=job.plan_images.set_column(1, "uri", uris))
    with pytest.raises(StorageError, match=f"^gone is listed, but neither .* of the 2 images of shard 1 is there on {os.uname().nodename}"):
        run(elsewhere, 0, 1)
    assert finished_shards(job.codes.path, "p") == {0}
    assert run(job, 0, 1)[1]["counts"]["n_images"] == 1


def test_a_receipt_says_which_machine_made_the_codes(job):
    (receipt,) = run(job, 0)
    assert receipt["encoder"]["torch"] == torch.__version__ and receipt["encoder"]["num_threads"] >= 1


def test_an_encoder_refuses_another_tokenizer_than_the_plans(job):
    with pytest.raises(ArtefactError) as error:
        ShardEncoder(dataclasses.replace(job, tokenizer_fingerprint="of another"))
    assert job.tokenizer_fingerprint in str(error.value) and "of another" in str(error.value)


def test_an_encoder_refuses_to_start_where_golden_images_get_other_codes(job):
    """As on a broken device: the tensors are right, the arithmetic is not."""
    codes = (np.array(job.probe["codes"]) + 1) % 32
    with pytest.raises(ArtefactError, match="golden images"):
        ShardEncoder(dataclasses.replace(job, probe={**job.probe, "codes": codes.tolist()}))
