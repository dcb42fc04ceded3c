"""What a tokenizer is fed: images, or maps of labels or numbers that are checked."""

import numpy as np
import pytest

from pipeline.inputs import render_input
from pipeline.sources import Example
from pipeline.views import crop_of
from stages.errors import ConfigError
from stages.options import ImageOptions, TokenizerOptions

IMAGES = ImageOptions(size=8)
IMAGE = np.zeros((8, 8, 3), np.uint8)


def rendered(values: np.ndarray, **options) -> np.ndarray:
    example = Example(IMAGE, {"map": values})
    return render_input(example, crop_of("center", 0, 8, 8), IMAGES, TokenizerOptions(input="map", **options), "a.png")


def test_ids_stay_and_numbers_fill_a_byte():
    ids = np.arange(64, dtype=np.int32).reshape(8, 8)
    assert np.array_equal(rendered(ids, num_labels=64)[..., 0], ids)
    numbers = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    assert np.abs(rendered(numbers)[..., 0] / 255 - numbers).max() <= 0.5 / 255 + 1e-6


@pytest.mark.parametrize(
    "values, options, message",
    [
        (np.full((8, 8), 5.0, np.float32), {}, r"has values from 5 to 5, and a map of numbers is in \[0, 1\]. Scale it"),
        (np.full((8, 8), np.nan, np.float32), {}, "has values from nan to nan"),
        (np.full((8, 8), -1), {"num_labels": 4}, "has the id -1, and ids count from 0. Give pixels without a label an id"),
        (np.full((8, 8), 255), {"num_labels": 21}, "has the id 255. Use at least 256; or give pixels without a label the next"),
        (np.zeros((4, 8), np.int64), {"num_labels": 4}, r"of a.png is of shape \(4, 8\) and its image of \(8, 8\)"),
        (np.zeros((8, 8), np.int64), {}, "num_labels is not set"),
        (np.zeros((8, 8), np.float32), {"num_labels": 4}, "a map of numbers. Leave it out"),
    ],
)
def test_maps_that_do_not_fit_are_refused_by_the_name_of_their_image(values, options, message):
    with pytest.raises(ConfigError, match=message):
        rendered(values, **options)
