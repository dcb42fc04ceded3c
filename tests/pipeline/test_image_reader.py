"""Reading training images: bad ones are replaced and named, condition maps come at the size of the image, wrong options are refused."""

import json
import logging
import os

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from pipeline.image_order import ImageOrder, list_hash
from pipeline.image_reader import ImageReader
from pipeline.sources import open_source
from stages.errors import ConfigError
from stages.options import ImageOptions, SourceOptions, TokenizerOptions, TokenizerTrainOptions

IMAGES = ImageOptions(size=16)


def reader_of(source_options, tokenizer=TokenizerOptions(), train=TokenizerTrainOptions(), batch=8):
    source = open_source(source_options, IMAGES)
    table = source.list_images("train")
    order = ImageOrder(list_hash=list_hash(table), num_images=len(table), seed=0, global_batch_size=batch)
    return ImageReader(source, order, IMAGES, tokenizer, train), table


def scenes(**tokenizer):
    return reader_of(SourceOptions(name="scenes", num_images=20), TokenizerOptions(**tokenizer))


def test_pixels_and_rows_of_a_step_are_the_same_every_time():
    reader, table = scenes()
    rows, pixels = reader.read_step(3, slice(0, 8), (), table)
    again_rows, again = scenes()[0].read_step(3, slice(0, 8), (), table)
    assert pixels.shape == (8, 16, 16, 3) and pixels.dtype == np.uint8
    assert np.array_equal(rows, reader.order.batch(3).rows) and np.array_equal(rows, again_rows)
    assert np.array_equal(pixels, again)


def test_slices_of_ranks_are_the_batch():
    reader, table = scenes()
    whole = reader.read_step(0, slice(0, 8), (), table)[1]
    parts = [reader.read_step(0, part, (), table)[1] for part in (slice(0, 3), slice(3, 8))]
    assert np.array_equal(np.concatenate(parts), whole)


def test_skipped_batches_are_left_out():
    reader, table = scenes()
    assert np.array_equal(
        reader.read_step(2, slice(0, 8), ((2, 4),), table)[1], reader.read_step(4, slice(0, 8), (), table)[1]
    )


@pytest.fixture
def folder(tmp_path):
    for i in range(6):
        Image.new("RGB", (20, 20), (40 * i, 0, 0)).save(tmp_path / f"{i}.png")
    return tmp_path


def test_an_image_that_cannot_be_used_is_named_and_replaced(folder, caplog):
    (folder / "2.png").write_bytes(b"not a picture")
    reader, table = reader_of(SourceOptions(name="image-folder", path=str(folder)), batch=6)
    with caplog.at_level(logging.WARNING):
        rows, pixels = reader.read_step(0, slice(0, 6), (), table)
    assert sorted(rows) == list(range(6))  # the order does not change
    assert "2.png" in caplog.text and "another takes its place" in caplog.text
    reds = sorted(pixels[:, 8, 8, 0].tolist())
    assert len(reds) == 6 and 80 not in reds
    assert np.array_equal(reader.read_step(0, slice(0, 6), (), table)[1], pixels)


def test_a_folder_of_bad_images_ends_the_training_clearly(folder):
    for path in folder.iterdir():
        path.write_bytes(b"")
    reader, table = reader_of(SourceOptions(name="image-folder", path=str(folder)), batch=6)
    with pytest.raises(ConfigError, match="^16 images in a row cannot be used"):
        reader.read_step(0, slice(0, 6), (), table)


def test_a_listed_image_that_is_gone_is_replaced_like_a_bad_one(folder):
    reader, table = reader_of(SourceOptions(name="image-folder", path=str(folder)), batch=6)
    (folder / "2.png").write_bytes(b"not a picture")
    expected = reader.read_step(0, slice(0, 6), (), table)
    os.remove(folder / "2.png")
    rows, pixels = reader.read_step(0, slice(0, 6), (), table)
    assert np.array_equal(rows, expected[0]) and np.array_equal(pixels, expected[1])


def test_a_fault_of_storage_is_no_bad_image_and_is_retried(folder, monkeypatch):
    monkeypatch.setattr("pipeline.fetch.READ_RETRY_SECONDS", 0.0)
    reader, table = reader_of(SourceOptions(name="image-folder", path=str(folder)), batch=6)
    expected = reader.read_step(0, slice(0, 6), (), table)[1]
    read, faults = reader.source.fetch, [TimeoutError("busy"), PermissionError("locked")]
    monkeypatch.setattr(reader.source, "fetch", lambda uri: read(uri) if not faults else _fail(faults.pop()))
    assert np.array_equal(reader.read_step(0, slice(0, 6), (), table)[1], expected)
    faults += [PermissionError("locked")] * 4
    with pytest.raises(PermissionError, match="locked"):
        reader.read_step(0, slice(0, 6), (), table)


def _fail(error):
    raise error


def test_label_maps_come_as_ids_at_the_size_of_the_image():
    reader, table = scenes(input="segmentation", num_labels=64)
    rows, ids = reader.read_step(0, slice(0, 8), (), table)
    assert ids.shape == (8, 16, 16, 1) and ids.dtype == np.uint8
    spec = json.loads(reader.source.fetch(table["uri"][int(rows[0])].as_py()))
    whole = reader.source.decode(json.dumps(spec).encode()).conditions["segmentation"]
    assert set(np.unique(ids[0])) <= set(np.unique(whole)) and len(np.unique(ids)) > 2


def test_maps_of_numbers_come_as_one_channel_of_pixels():
    reader, table = scenes(input="depth")
    _, depth = reader.read_step(0, slice(0, 8), (), table)
    assert depth.shape == (8, 16, 16, 1) and depth.min() < 100 and depth.max() > 200


@pytest.mark.parametrize(
    "tokenizer, words",
    [
        ({"input": "weather"}, ["16 images in a row cannot be used", "no weather"]),
        ({"input": "segmentation"}, ["tokenizer.num_labels is not set"]),
        ({"input": "segmentation", "num_labels": 2}, ["tokenizer.num_labels is 2", "has the id", "Use at least"]),
        ({"input": "depth", "num_labels": 9}, ["tokenizer.num_labels is 9", "a map of numbers"]),
    ],
)
def test_maps_that_do_not_fit_are_refused(tokenizer, words):
    reader, table = scenes(**tokenizer)
    with pytest.raises(ConfigError) as caught:
        reader.read_step(0, slice(0, 8), (), table)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_only_the_uris_of_the_list_are_needed():
    reader, table = scenes()
    uris = pa.table({"uri": table["uri"]})
    assert np.array_equal(reader.read_step(0, slice(0, 2), (), uris)[1], reader.read_step(0, slice(0, 2), (), table)[1])
