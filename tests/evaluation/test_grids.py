import io

import numpy as np
from PIL import Image

from evaluation.grids import grid_positions, tiles_png


def test_rows_are_classes_in_order():
    labels = np.array([2, 0, 1, 2, 0, 1, 2, 0, 1, 2])
    positions, columns = grid_positions(labels, 8)
    assert columns == 2
    assert labels[positions].tolist() == [0, 0, 1, 1, 2, 2]
    assert positions.tolist() == [1, 4, 2, 5, 0, 3]


def test_rows_keep_one_length_when_a_class_is_rare():
    positions, columns = grid_positions(np.array([0, 0, 0, 0, 1]), 4)
    assert (positions.tolist(), columns) == ([0, 4], 1)


def test_without_classes_the_first_images_are_shown():
    positions, columns = grid_positions(np.full(100, -1), 16)
    assert (positions.tolist(), columns) == (list(range(16)), None)


def test_with_more_classes_than_places_one_image_of_each_of_the_first_is_shown():
    positions, columns = grid_positions(np.arange(100), 16)
    assert (positions.tolist(), columns) == (list(range(16)), None)
    positions, columns = grid_positions(np.repeat(np.arange(100), 50), 16)  # as the files of most datasets are listed
    assert (positions.tolist(), columns) == (list(range(0, 800, 50)), None)


def test_a_missing_tile_stays_white():
    tiles = {0: np.zeros((64, 64, 3), np.uint8)}
    with Image.open(io.BytesIO(tiles_png(tiles, np.array([0, 5]), 2))) as image:
        pixels = np.asarray(image.convert("RGB"))
    assert pixels[:, :64].max() == 0 and pixels[:, -64:].min() == 255
