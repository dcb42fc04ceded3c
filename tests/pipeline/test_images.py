"""Decoding whatever people store, and cropping it."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline import images
from pipeline.images import VIEWS, apply_view, decode_image, preprocessing_spec
from stages.errors import BadImage
from stages.options import ImageOptions

RED = (200, 30, 40)


def encode(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def red(mode: str = "RGB") -> Image.Image:
    return Image.new("RGB", (12, 10), RED).convert(mode)


def half_transparent(mode: str) -> Image.Image:
    """Left half opaque black, right half transparent black."""
    image = Image.new("RGBA", (12, 10), (0, 0, 0, 255))
    image.paste((0, 0, 0, 0), (6, 0, 12, 10))
    return image.convert(mode)


def turned(orientation: int) -> bytes:
    """12 x 10 pixels whose top left corner is bright, to be shown turned."""
    image = Image.new("RGB", (12, 10))
    image.paste((255, 255, 255), (0, 0, 4, 4))
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(image, "PNG", exif=exif)


COLOUR = {
    "PNG": encode(red()),
    "JPEG": encode(red(), "JPEG", quality=95),
    "progressive JPEG": encode(red(), "JPEG", quality=95, progressive=True),
    "WebP": encode(red(), "WEBP", lossless=True),
    "BMP": encode(red(), "BMP"),
    "TIFF": encode(red(), "TIFF"),
    "LZW TIFF": encode(red(), "TIFF", compression="tiff_lzw"),
    "PPM": encode(red(), "PPM"),
    "palette PNG": encode(red().quantize(8)),
    "GIF": encode(red().quantize(8), "GIF"),
    "animated GIF": encode(red(), "GIF", save_all=True, append_images=[Image.new("RGB", (12, 10), "blue")]),
    "animated WebP": encode(red(), "WEBP", save_all=True, lossless=True, append_images=[Image.new("RGB", (12, 10))]),
    "TIFF of two pages": encode(red(), "TIFF", save_all=True, append_images=[Image.new("RGB", (12, 10))]),
    "CMYK JPEG": encode(red("CMYK"), "JPEG", quality=95),
    "CMYK TIFF": encode(red("CMYK"), "TIFF"),
    "YCbCr TIFF": encode(red("YCbCr"), "TIFF"),
    "opaque RGBA": encode(red("RGBA")),
}


@pytest.mark.parametrize("kind", COLOUR)
def test_colour_images(kind):
    pixels = decode_image(COLOUR[kind])
    assert pixels.shape == (10, 12, 3) and pixels.dtype == np.uint8
    assert np.abs(pixels.astype(int) - RED).max() <= 6


GREY_VALUE = {
    "8 bit": (encode(Image.new("L", (12, 10), 90)), 90),
    "grey JPEG": (encode(Image.new("L", (12, 10), 90), "JPEG"), 90),
    "1 bit": (encode(Image.new("1", (12, 10), 1)), 255),
    "16 bit PNG": (encode(Image.fromarray(np.full((10, 12), 90 * 257, np.uint16))), 90),
    "16 bit TIFF": (encode(Image.fromarray(np.full((10, 12), 90 * 257, np.uint16)), "TIFF"), 90),
    "32 bit TIFF": (encode(Image.fromarray(np.full((10, 12), 90 * 257, np.int32)), "TIFF"), 90),
    "float TIFF": (encode(Image.fromarray(np.full((10, 12), 90.0, np.float32)), "TIFF"), 90),
    "float TIFF of NaN": (encode(Image.fromarray(np.full((10, 12), np.nan, np.float32)), "TIFF"), 0),
}


@pytest.mark.parametrize("kind", GREY_VALUE)
def test_grey_images(kind):
    data, value = GREY_VALUE[kind]
    pixels = decode_image(data)
    assert pixels.shape == (10, 12, 1) and pixels.dtype == np.uint8 and (pixels == value).all()


TRANSPARENT = {
    "RGBA PNG": encode(half_transparent("RGBA")),
    "LA PNG": encode(half_transparent("LA")),
    "palette PNG with alpha": encode(half_transparent("RGBA").quantize(4)),
    "RGBA WebP": encode(half_transparent("RGBA"), "WEBP", lossless=True),
    "GIF with alpha": encode(half_transparent("RGBA"), "GIF"),
    "RGB PNG with a transparent colour": encode(
        Image.fromarray(np.repeat([[[0, 0, 0]] * 6 + [[9, 9, 9]] * 6], 10, axis=0).astype(np.uint8)),
        transparency=(9, 9, 9),
    ),
}


@pytest.mark.parametrize("kind", TRANSPARENT)
def test_transparent_pixels_become_white(kind):
    pixels = decode_image(TRANSPARENT[kind])
    assert pixels.shape == (10, 12, 3)
    assert (pixels[:, :6] == 0).all() and (pixels[:, 6:] == 255).all()


@pytest.mark.parametrize(
    ("orientation", "shape", "corner"),
    [
        (1, (10, 12), (0, 0)),
        (2, (10, 12), (0, -1)),
        (3, (10, 12), (-1, -1)),
        (4, (10, 12), (-1, 0)),
        (5, (12, 10), (0, 0)),
        (6, (12, 10), (0, -1)),
        (7, (12, 10), (-1, -1)),
        (8, (12, 10), (-1, 0)),
        (9, (10, 12), (0, 0)),
    ],
)
def test_exif_orientation_is_applied(orientation, shape, corner):
    pixels = decode_image(turned(orientation))
    assert pixels.shape[:2] == shape and (pixels[corner] == 255).all()
    assert (pixels[..., 0] == 255).sum() == 16


def test_an_odd_exif_field_does_not_lose_the_photograph():
    exif = Image.Exif()
    exif[0x0112], exif[0x011A] = 6, 1.5
    odd = exif.tobytes().replace(b"\x01\x1a\x00\x05", b"\x01\x07\x00\x05")  # a fraction under an integer's tag
    assert odd != exif.tobytes()
    assert decode_image(encode(red(), "JPEG", exif=odd)).shape == (12, 10, 3)


def png_chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png_of_claimed_size(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", zlib.compress(b"\0" * 100))


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
BAD = {
    "no bytes": (b"", "empty"),
    "text": (b"<html>404 Not Found</html>", "not-an-image"),
    "zeros": (bytes(1000), "not-an-image"),
    "a header alone": (encode(NOISE, "JPEG")[:4], "not-an-image"),
    "half a JPEG": (encode(NOISE, "JPEG")[:2000], "truncated"),
    "half a PNG": (encode(NOISE, "PNG")[:6000], "truncated"),
    "half a BMP": (encode(NOISE, "BMP")[:6000], "truncated"),
    "half a GIF": (encode(NOISE.quantize(64), "GIF")[:1500], "truncated"),
    "half a WebP": (encode(NOISE, "WEBP", lossless=True)[:3000], "undecodable"),
    "a large bomb": (png_of_claimed_size(60_000, 60_000), "decompression-bomb"),
    "a bomb that Pillow only warns of": (png_of_claimed_size(10_000, 10_000), "decompression-bomb"),
    "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n", "not-an-image"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_content_is_named(case):
    data, kind = BAD[case]
    with pytest.raises(BadImage) as error:
        decode_image(data)
    assert error.value.kind == kind and error.value.message


SEEDS = [*COLOUR.values(), *(data for data, _ in GREY_VALUE.values()), *TRANSPARENT.values(), turned(6)]


@settings(max_examples=300, deadline=None)
@given(
    data=st.sampled_from(SEEDS),
    changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=5),
    length=st.floats(0.1, 1),
)
def test_damaged_bytes_give_pixels_or_a_bad_image_and_no_warning(data, changes, length):
    damaged = bytearray(data)
    for place, value in changes:
        damaged[int(place * len(damaged))] = value
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            pixels = decode_image(bytes(damaged[: int(length * len(damaged))]))
        except BadImage:
            return
    assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[-1] in (1, 3)


@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(1, 90),
    width=st.integers(1, 90),
    size=st.integers(8, 64),
    source_channels=st.sampled_from([1, 3]),
    channels=st.sampled_from([1, 3]),
)
def test_every_view_has_the_promised_shape(height, width, size, source_channels, channels):
    image = np.random.default_rng(0).integers(0, 256, (height, width, source_channels), dtype=np.uint8)
    options = ImageOptions(size=size, channels=channels)
    for view in VIEWS:
        pixels = apply_view(image, view, options)
        assert pixels.shape == (size, size, channels) and pixels.dtype == np.uint8


def test_an_image_of_the_right_size_is_not_touched():
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    assert np.array_equal(apply_view(image, "center", ImageOptions(size=32)), image)
    assert np.array_equal(apply_view(image, "flip", ImageOptions(size=32)), image[:, ::-1])


def test_the_middle_is_kept():
    image = np.zeros((16, 48, 3), np.uint8)
    image[:, 16:32] = 255
    assert (apply_view(image, "center", ImageOptions(size=16)) == 255).all()
    assert (apply_view(image.transpose(1, 0, 2), "center", ImageOptions(size=16)) == 255).all()


def test_shrinking_is_antialiased():
    stripes = np.zeros((256, 256, 1), np.uint8)
    stripes[:, ::2] = 255
    small = apply_view(stripes, "center", ImageOptions(size=32, channels=1)).astype(int)
    assert np.abs(small - 127).max() <= 8


def test_grey_is_luminance_and_rgb_of_grey_is_grey():
    green = np.zeros((8, 8, 3), np.uint8)
    green[..., 1] = 255
    assert (apply_view(green, "center", ImageOptions(size=8, channels=1)) == 150).all()
    grey = np.full((8, 8, 1), 77, np.uint8)
    assert (apply_view(grey, "center", ImageOptions(size=8, channels=3)) == 77).all()


def test_images_that_cannot_be_cropped_are_bad_images():
    with pytest.raises(BadImage) as error:
        apply_view(np.zeros((0, 5, 3), np.uint8), "center", ImageOptions(size=8))
    assert error.value.kind == "too-small"
    with pytest.raises(BadImage) as error:
        apply_view(np.zeros((1, 50_000, 1), np.uint8), "center", ImageOptions(size=256))
    assert error.value.kind == "decompression-bomb"


def test_the_specification_tells_options_apart():
    specs = [preprocessing_spec(ImageOptions(**changes)) for changes in ({}, {"size": 64}, {"channels": 1})]
    assert specs[0] == preprocessing_spec(ImageOptions()) and specs[0]["version"] == images.PREPROCESSING_VERSION
    assert all(specs[0] != other for other in specs[1:])
