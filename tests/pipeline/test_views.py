"""Where views lie, how they are rendered, and which names a configuration may use."""

from dataclasses import astuple, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.views import (
    PREPROCESSING_VERSION,
    Crop,
    apply_view,
    crop_of,
    expand_views,
    parse,
    preprocessing_spec,
    render,
    render_map,
)
from stages.errors import BadImage, ConfigError
from stages.options import ImageOptions

ALL = expand_views(["center", "flip", "ten-crop", "random-crop:2", "random-crop:1@0.1"])
SIDES = st.one_of(st.integers(1, 90), st.sampled_from([1, 2, 3000]))
WHOLE = Crop(0, 0, 8, 8, is_flipped=False)


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def ramps(height: int, width: int) -> np.ndarray:
    """Pixels that say where they are: x in red, y in green."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x, y, 0 * x], axis=-1).astype(np.uint8)


def grey(size: int) -> ImageOptions:
    return ImageOptions(size=size, channels=1)


def bicubic_weights(num_pixels: int, start: float, length: float, size: int) -> np.ndarray:
    """Antialiased bicubic (a = -1/2) from a line of pixels to `size` samples of a part of it, (size, num_pixels)."""
    step = length / size
    middles = start + (np.arange(size) + 0.5) * step
    x = np.abs((np.arange(num_pixels) + 0.5 - middles[:, None]) / max(step, 1))
    near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    weights = np.where(x < 1, near, np.where(x < 2, far, 0))
    return weights / weights.sum(axis=1, keepdims=True)


def reference_render(image: np.ndarray, crop: Crop, size: int) -> np.ndarray:
    across = bicubic_weights(image.shape[1], crop.left, crop.width, size)
    down = bicubic_weights(image.shape[0], crop.top, crop.height, size)
    pixels = down @ np.rint(image[..., 0] @ across.T)
    return pixels[:, ::-1] if crop.is_flipped else pixels


# Names


def test_configured_names_become_stored_names():
    assert expand_views(["center"]) == ("center",)
    assert expand_views(("flip", "center")) == ("flip", "center")
    assert expand_views(["ten-crop"]) == tuple(f"ten-crop@1.1/{i}" for i in range(10))
    assert expand_views(["ten-crop@1.05"]) == tuple(f"ten-crop@1.05/{i}" for i in range(10))
    assert expand_views(["random-crop:3"]) == tuple(f"random-crop@0.8/{i}" for i in range(3))
    assert expand_views(["center", "random-crop:2@.50"]) == ("center", "random-crop@0.5/0", "random-crop@0.5/1")
    assert len(expand_views(["ten-crop@4", "random-crop:1000@1", "random-crop:1@0.000001"])) == 1011


@pytest.mark.parametrize("name", [*ALL, *expand_views(["ten-crop@4", "random-crop:12@1", "random-crop:1@0.000001"])])
def test_stored_names_are_read_back(name):
    assert parse(name).name == name


@pytest.mark.parametrize(
    ("names", "rule"),
    [
        ([], "it must name at least one view"),
        (["center", "mirror"], "'mirror' is not a view"),
        ([""], "'' is not a view"),
        (["Center"], "'Center' is not a view"),
        (["center@2"], "'center@2' is not a view"),
        (["center\n"], r"'center\n' is not a view"),
        (["ten-crop:3"], "'ten-crop:3' is not a view"),
        (["ten-crop@"], "'ten-crop@' is not a view"),
        (["ten-crop@big"], "'ten-crop@big' is not a view"),
        (["ten-crop@nan"], "'ten-crop@nan' is not a view"),
        (["ten-crop@1.1/3"], "'ten-crop@1.1/3' is not a view"),
        (["random-crop"], "'random-crop' is not a view"),
        (["random-crop:-1"], "'random-crop:-1' is not a view"),
        (["random-crop:4@-0.5"], "'random-crop:4@-0.5' is not a view"),
        (["ten-crop@1"], "ENLARGE of 'ten-crop@1' must be above 1 and at most 4"),
        (["ten-crop@4.1"], "ENLARGE of 'ten-crop@4.1' must be above 1 and at most 4"),
        (["random-crop:4@0"], "SHARE of 'random-crop:4@0' must be above 0 and at most 1"),
        (["random-crop:4@1.01"], "SHARE of 'random-crop:4@1.01' must be above 0 and at most 1"),
        (["random-crop:0"], "N of 'random-crop:0' must be from 1 to 1000"),
        (["random-crop:1001"], "N of 'random-crop:1001' must be from 1 to 1000"),
        (["flip", "center", "flip"], "that names the view flip more than once"),
        (["ten-crop", "ten-crop@1.10"], "that names the view ten-crop@1.1/0 more than once"),
        (["random-crop:2", "random-crop:5@0.8"], "that names the view random-crop@0.8/0 more than once"),
    ],
)
def test_names_that_cannot_be_used_are_refused(names, rule):
    with pytest.raises(ConfigError) as error:
        expand_views(names)
    text = str(error.value)
    assert text.startswith(f"images.views is {names}, but {rule}. ") and text.endswith(".")
    assert text.removeprefix(f"images.views is {names}, but {rule}. ").startswith(("Use ", "Write e.g. ", "Name "))


@pytest.mark.parametrize("name", ["mirror", "ten-crop", "random-crop", "random-crop@0.8", "center@2.0/1", "flip/1"])
def test_only_stored_names_have_a_crop(name):
    with pytest.raises(ValueError, match="not the name of a stored view"):
        crop_of(name, 0, 8, 8)


# Places


@settings(max_examples=200, deadline=None)
@given(height=SIDES, width=SIDES, image_id=st.integers(-(2**63), 2**63 - 1))
def test_every_crop_is_inside_the_image(height, width, image_id):
    for view in ALL:
        crop = crop_of(view, image_id, height, width)
        assert 0 <= crop.left and crop.left + crop.width <= width and crop.width > 0
        assert 0 <= crop.top and crop.top + crop.height <= height and crop.height > 0


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
def test_an_image_without_pixels_is_too_small(shape):
    for view in ALL:
        with pytest.raises(BadImage) as error:
            apply_view(np.zeros((*shape, 3), np.uint8), view, ImageOptions(size=8))
        assert error.value.kind == "too-small"


@given(height=SIDES, width=SIDES)
def test_the_centre_is_the_largest_centred_square(height, width):
    crop = crop_of("center", 0, height, width)
    assert crop.width == crop.height == min(height, width)
    assert abs(2 * crop.left + crop.width - width) <= 1 and abs(2 * crop.top + crop.height - height) <= 1
    assert crop_of("flip", 0, height, width) == replace(crop, is_flipped=True) != crop


@pytest.mark.parametrize(("height", "width"), [(100, 140), (140, 100)])
def test_ten_crops_are_the_corners_and_the_middle_and_their_mirror_images(height, width):
    image, options = ramps(height, width), ImageOptions(size=20)
    left, top = (width - 100) / 2, (height - 100) / 2
    for i, (x, y) in enumerate([(40, 40), (60, 40), (40, 60), (60, 60), (50, 50)]):
        pixels, mirrored = [apply_view(image, f"ten-crop@1.25/{j}", options).astype(int) for j in (i, i + 5)]
        where = pixels[..., :2].mean(axis=(0, 1))
        assert np.abs(where - [left + x - 0.5, top + y - 0.5]).max() < 0.6
        steps = np.diff(pixels[..., 0], axis=1)
        assert (np.abs(steps - 4) <= 2).all()  # 80 pixels on 20
        assert np.array_equal(mirrored, pixels[:, ::-1])


@settings(max_examples=100, deadline=None)
@given(height=SIDES, width=SIDES, share=st.sampled_from([0.01, 0.5, 0.8, 1.0]), image_id=st.integers(0, 2**62))
def test_random_crops_have_their_share_of_the_image_or_are_its_centre(height, width, share, image_id):
    crop = crop_of(f"random-crop@{share}/0", image_id, height, width)
    if replace(crop, is_flipped=False) != crop_of("center", image_id, height, width):
        assert crop.width * crop.height >= share * height * width * (1 - 1e-9)
        assert 3 / 4 - 1e-9 <= crop.width / crop.height <= 4 / 3 + 1e-9
        assert min(crop.width, crop.height) >= 1


def test_random_crops_of_a_long_image_are_its_centre_mirrored_or_not():
    crops = {crop_of("random-crop@0.8/0", i, 50, 300) for i in range(50)}
    assert crops == {crop_of("center", 0, 50, 300), crop_of("flip", 0, 50, 300)}


def random_crops(share: float, num: int = 4000, index: int = 0) -> np.ndarray:
    """Of square images, (num, 5): x and y as shares of the room, share of the area, log aspect ratio, is flipped."""
    crops = [crop_of(f"random-crop@{share}/{index}", i, 1000, 1000) for i in range(num)]
    left, top, width, height, is_flipped = np.array([astuple(crop) for crop in crops]).T
    room_x, room_y = np.maximum(1000 - width, 1e-9), np.maximum(1000 - height, 1e-9)
    return np.stack([left / room_x, top / room_y, width * height / 1e6, np.log(width / height), is_flipped], axis=1)


def test_random_crops_are_uniform():
    crops = random_crops(0.04)
    for column in (0, 1):
        assert np.abs(np.quantile(crops[:, column], [0.1, 0.5, 0.9]) - [0.1, 0.5, 0.9]).max() < 0.03
    small = crops[crops[:, 2] < 0.5]  # fit whatever their aspect ratio is
    ends = np.array([0.04, 0.5]), np.log([3 / 4, 4 / 3])
    for column, (low, high) in zip((2, 3), ends, strict=True):
        spread = low + (high - low) * np.array([0.1, 0.5, 0.9])
        assert np.abs(np.quantile(small[:, column], [0.1, 0.5, 0.9]) - spread).max() < 0.04 * (high - low)
    assert abs(crops[:, 4].mean() - 0.5) < 0.03


def test_random_crops_of_neighbours_and_of_views_have_nothing_in_common():
    crops, other_view, other_share = random_crops(0.5), random_crops(0.5, index=1), random_crops(0.51)
    for column in range(5):
        values = crops[:, column]
        pairs = [(values[:-1], values[1:]), (values, other_view[:, column]), (values, other_share[:, column])]
        pairs += [(values, np.arange(len(values)))]
        pairs += [(values, crops[:, other]) for other in range(column)]
        for one, other in pairs:
            assert abs(np.corrcoef(one, other)[0, 1]) < 0.07


def test_random_crops_never_change():
    crop = crop_of("random-crop@0.8/0", 1234, 300, 400)
    assert crop == crop_of("random-crop@0.8/0", np.int64(1234), 300, 400)
    box = [42.52177930183161, 0.5103002087439983, 328.7279903341146, 292.1364259559875]
    assert np.allclose([crop.left, crop.top, crop.width, crop.height], box, rtol=1e-12) and not crop.is_flipped


# Rendering


@settings(max_examples=60, deadline=None)
@given(
    height=SIDES,
    width=SIDES,
    size=st.integers(8, 64),
    source_channels=st.sampled_from([1, 3]),
    channels=st.sampled_from([1, 3]),
)
def test_every_view_has_the_promised_shape(height, width, size, source_channels, channels):
    image, options = noise(height, width, source_channels), ImageOptions(size=size, channels=channels)
    for view in ALL:
        pixels = apply_view(image, view, options)
        assert pixels.shape == (size, size, channels) and pixels.dtype == np.uint8


@settings(max_examples=100, deadline=None)
@given(
    height=st.integers(1, 90),
    width=st.integers(1, 90),
    size=st.integers(8, 64),
    view=st.sampled_from(ALL),
    image_id=st.integers(0, 100),
)
def test_a_view_is_an_antialiased_bicubic_resize_that_sees_around_its_box(height, width, size, view, image_id):
    image = noise(height, width, 1) // 4 + 96  # so that no overshoot is cut off: Pillow chooses which axis is first
    wanted = reference_render(image, crop_of(view, image_id, height, width), size)
    assert np.abs(apply_view(image, view, grey(size), image_id)[..., 0] - wanted).max() < 2


def test_the_centre_of_a_square_is_what_pillow_makes_of_it():
    image = noise(50, 50)
    wanted = Image.fromarray(image).resize((24, 24), Image.Resampling.BICUBIC)
    assert np.array_equal(apply_view(image, "center", ImageOptions(size=24)), np.asarray(wanted))


@pytest.mark.parametrize("shape", [(32, 32), (32, 33), (37, 32)])
def test_a_square_of_the_right_size_is_not_touched(shape):
    image = noise(*shape)
    top, left = (shape[0] - 32) // 2, (shape[1] - 32) // 2
    square = image[top : top + 32, left : left + 32]
    assert np.array_equal(apply_view(image, "center", ImageOptions(size=32)), square)
    assert np.array_equal(apply_view(image, "flip", ImageOptions(size=32)), square[:, ::-1])


@given(height=SIDES, width=SIDES, channels=st.sampled_from([1, 3]))
@settings(max_examples=30, deadline=None)
def test_flipping_mirrors_exactly(height, width, channels):
    image, options = noise(height, width), ImageOptions(size=16, channels=channels)
    assert np.array_equal(apply_view(image, "flip", options), apply_view(image, "center", options)[:, ::-1])


def test_the_middle_is_kept():
    image = np.zeros((16, 48, 3), np.uint8)
    image[:, 16:32] = 255
    for upright in (image, image.transpose(1, 0, 2)):
        pixels = apply_view(upright, "center", ImageOptions(size=16))
        assert (pixels == 255).all()


def test_shrinking_is_antialiased():
    stripes = np.zeros((256, 256, 1), np.uint8)
    stripes[:, ::2] = 255
    assert np.abs(apply_view(stripes, "center", grey(32)).astype(int) - 127).max() <= 8


def test_grey_is_luminance_and_rgb_of_grey_is_grey():
    green = np.zeros((8, 8, 3), np.uint8)
    green[..., 1] = 255
    assert (apply_view(green, "center", grey(8)) == 150).all()
    assert (apply_view(np.full((8, 8, 1), 77, np.uint8), "center", ImageOptions(size=8)) == 77).all()


def test_a_random_view_is_that_of_the_image_id():
    image, options = ramps(90, 110), ImageOptions(size=16)
    view = "random-crop@0.5/0"
    for image_id in (0, 1, 2):
        wanted = render(image, crop_of(view, image_id, 90, 110), options)
        assert np.array_equal(apply_view(image, view, options, image_id), wanted)
    assert not np.array_equal(apply_view(image, view, options, 1), apply_view(image, view, options, 2))


def test_a_crop_of_another_image_is_refused():
    with pytest.raises(ValueError, match="[Bb]ox"):
        render(noise(8, 8), Crop(4, 0, 8, 8, is_flipped=False), ImageOptions(size=8))


# Condition maps


@settings(max_examples=100, deadline=None)
@given(
    view=st.sampled_from(ALL),
    image_id=st.integers(0, 1000),
    height=st.integers(60, 120),
    width=st.integers(60, 120),
    dtype=st.sampled_from([np.uint8, np.float32]),
)
def test_a_map_lies_on_its_image(view, image_id, height, width, dtype):
    segments = np.random.default_rng(image_id).integers(0, 2, (3, 3), dtype=np.uint8)
    image = segments.repeat(40, axis=0).repeat(40, axis=1)[:height, :width]
    crop = crop_of(view, image_id, height, width)
    cells = render(255 * image[..., None], crop, grey(64)).reshape(8, 8, 8, 8).swapaxes(1, 2).reshape(8, 8, 64)
    is_plain = cells.min(axis=-1) == cells.max(axis=-1)
    codes = render_map(image.astype(dtype), crop, (8, 8))
    assert is_plain.mean() > 0.3
    one = 1 if dtype is np.uint8 else 255
    assert np.array_equal(codes[is_plain] * (255 // one), cells[..., 0][is_plain])


def test_ids_are_taken_at_the_middle_of_each_cell():
    ids = np.arange(64, dtype=np.int32).reshape(8, 8)
    codes = render_map(ids, WHOLE, (2, 4))
    assert codes.dtype == np.uint8 and np.array_equal(codes, ids[2::4, 1::2])
    assert np.array_equal(render_map(ids, WHOLE, (4, 2)), ids[1::2, 2::4])
    assert np.array_equal(render_map(ids, replace(WHOLE, is_flipped=True), (2, 4)), codes[:, ::-1])
    assert np.array_equal(render_map(ids, Crop(2, 3, 3, 3, is_flipped=False), (3, 3)), ids[3:6, 2:5])
    assert np.array_equal(render_map(ids % 2 == 1, WHOLE, (8, 8)), ids % 2)


def test_floats_are_averaged_over_each_cell():
    depth = np.random.default_rng(0).random((8, 8))
    wanted = np.rint(255 * depth.reshape(2, 4, 4, 2).mean(axis=(1, 3)))
    codes = render_map(depth, WHOLE, (2, 4))
    assert codes.dtype == np.uint8 and np.array_equal(codes, wanted)
    assert np.array_equal(render_map(depth, replace(WHOLE, is_flipped=True), (2, 4)), wanted[:, ::-1])
    assert set(render_map(np.ones((8, 8), np.float16), WHOLE, (3, 3)).flat) == {255}


@pytest.mark.parametrize(
    "values",
    [
        np.full((8, 8), 256),
        np.full((8, 8), -1),
        np.full((8, 8), 1.01),
        np.full((8, 8), -0.01),
        np.full((8, 8), np.nan),
        np.zeros((8, 8, 1), np.uint8),
        np.zeros(8, np.float32),
    ],
    ids=["above uint8", "negative", "above one", "below zero", "not a number", "3-D", "1-D"],
)
def test_maps_that_cannot_be_stored_are_refused(values):
    with pytest.raises(ValueError, match="a condition map"):
        render_map(values, WHOLE, (2, 2))


# Identity


def test_the_specification_tells_options_apart():
    specs = [preprocessing_spec(ImageOptions(**changes)) for changes in ({}, {"size": 64}, {"channels": 1})]
    assert specs[0] == preprocessing_spec(ImageOptions()) and specs[0]["version"] == PREPROCESSING_VERSION == 2
    assert all(specs[0] != other for other in specs[1:])
