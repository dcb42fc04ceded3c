"""Pictures of the page: small, cut by class where classes stand together, evenly chosen where there are many."""

import base64
import io

import numpy as np
import pytest
from PIL import Image
from report_support import pictures, record

from evaluation.records import Record
from evaluation.sheets import MAX_TILE, make_sheet
from evaluation.viewer import MAX_FRAMES, gather_pictures
from pipeline.grids import grid_png


def opened(sheet):
    return Image.open(io.BytesIO(base64.b64decode(sheet.uri.partition(",")[2])))


def colours(num_images, side=16):
    """Images of one colour each, all different."""
    shades = np.linspace(10, 250, num_images).astype(np.uint8)
    return np.broadcast_to(shades[:, None, None, None], (num_images, side, side, 1)).copy()


def test_small_grids_are_taken_as_they_are():
    png = grid_png(colours(6), 3)
    sheet = make_sheet(png, {"num_columns": 3, "labels": [0, 0, 0, 1, 1, 1]})
    assert base64.b64decode(sheet.uri.removeprefix("data:image/png;base64,")) == png


@pytest.mark.parametrize("labels", [[0, 0, 0, 1, 1, 1], [0, 1, 2, 3, 4, 5]])
def test_the_box_of_a_class_holds_its_tiles_and_nothing_else(labels):
    images = colours(6)
    sheet = make_sheet(grid_png(images, 3), {"num_columns": 3, "labels": labels})
    pixels = np.asarray(opened(sheet))
    assert set(sheet.boxes) == set(labels)
    for label, (left, top, width, height) in sheet.boxes.items():
        x, y = round(left * sheet.width), round(top * sheet.height)
        cut = pixels[y : y + round(height * sheet.height), x : x + round(width * sheet.width)]
        own = {int(images[i, 0, 0, 0]) for i in range(6) if labels[i] == label}
        assert set(np.unique(cut)) - {255} == own


@pytest.mark.parametrize("labels", [[0, 1, 0, 1], [-1, -1, -1, -1], [0, 0, 0, 1]])
def test_what_does_not_stand_together_is_not_cut(labels):
    assert make_sheet(grid_png(colours(4), 2), {"num_columns": 2, "labels": labels}).boxes == {}


def test_large_images_are_made_small():
    noise = np.random.default_rng(0).integers(0, 256, (4, 256, 256, 3), np.uint8)
    png = grid_png(noise, 2)
    sheet = make_sheet(png, {"num_columns": 2, "labels": [0, 1, 2, 3]})
    assert sheet.uri.startswith("data:image/webp") and len(sheet.uri) < len(png) / 5
    assert opened(sheet).size == (sheet.width, sheet.height) and sheet.width <= 2 * MAX_TILE + 2
    assert make_sheet(png).width <= 8 * MAX_TILE, "also where nothing is known of its tiles"


def with_grids(records):
    grids, layouts = pictures(200)
    changed = {"grids": dict.fromkeys(grids, "x"), "layouts": layouts}
    return [Record(each.path, {**each.content, **changed}) for each in records]


def gather(records):
    return gather_pictures(records, read=lambda path: pictures(200)[0]["samples"], link=lambda record: record.id)


def test_a_long_history_shows_its_first_its_last_and_some_between():
    found = gather(with_grids([record(100 * (i + 1), 1.0, night=i % 28 + 1) for i in range(45)]))
    (viewer,) = found.viewers
    assert (len(viewer.frames), viewer.num_left_out) == (MAX_FRAMES, 15)
    assert viewer.frames[0].caption.startswith("Step 100,") and viewer.frames[-1].caption.startswith("Step 4,500,")


def test_series_have_viewers_of_their_own_the_newest_first():
    records = [record(100, 1.0, night=2), record(200, 1.0, night=4), record(100, 1.0, night=3, run="/runs/b")]
    found = gather(with_grids(records))
    assert [(viewer.name, len(viewer.frames)) for viewer in found.viewers] == [("runs/a", 2), ("runs/b", 1)]
    assert found.classes == {0: "circle", 1: "square", 2: "star"}
    assert [frame.caption for frame in found.still] == ["Held-out real images", "The same images after the tokenizer"]


def test_records_without_pictures_and_no_records_show_none():
    assert gather([record(100, 1.0)]).viewers == [] and gather([]).viewers == ()
