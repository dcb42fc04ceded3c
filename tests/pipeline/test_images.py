"""Decoding whatever people store."""

import io
import struct
import warnings
import zipfile
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import EpsImagePlugin, Image, ImageCms, features

from pipeline.images import decode_image, decode_label_map, decode_number_map
from pipeline.sources.image_folder import ImageFolder
from stages.errors import BadImage
from stages.options import ImageOptions, SourceOptions

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


def png_chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, depth: int, colour_type: int, pixels: bytes) -> bytes:
    """A PNG written by hand; `pixels` is what stands in its rows, each after a zero byte."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    chunks = png_chunk(b"IHDR", header), png_chunk(b"IDAT", zlib.compress(pixels)), png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def flip_bit(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


def ycck_jpeg() -> bytes:
    """The inks of `red` as luminance, chroma and black, and marked so."""
    cyan, magenta, yellow, black = red("CMYK").getpixel((0, 0))
    stored = Image.new("RGB", (1, 1), (cyan, magenta, yellow)).convert("YCbCr").getpixel((0, 0))
    data = encode(Image.new("CMYK", (12, 10), (*(255 - value for value in stored), black)), "JPEG", quality=95)
    transform = data.index(b"Adobe") + 11  # the byte that says how colours were converted
    return data[:transform] + b"\2" + data[transform + 1 :]


def without_adobe_marker(data: bytes) -> bytes:
    start = data.index(b"\xff\xee")
    return data[:start] + data[start + 16 :]


PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
BLUE = Image.new("RGB", (12, 10), "blue")
RED_PNG, RED_CMYK_JPEG = encode(red()), encode(red("CMYK"), "JPEG", quality=95)
COLOUR = {
    "PNG": RED_PNG,
    "JPEG": encode(red(), "JPEG", quality=95),
    "progressive JPEG": encode(red(), "JPEG", quality=95, progressive=True),
    "WebP": encode(red(), "WEBP", lossless=True),
    "BMP": encode(red(), "BMP"),
    "TIFF": encode(red(), "TIFF"),
    "LZW TIFF": encode(red(), "TIFF", compression="tiff_lzw"),
    "PPM": encode(red(), "PPM"),
    "palette PNG": encode(red().quantize(8)),
    "GIF": encode(red().quantize(8), "GIF"),
    "animated GIF": encode(red(), "GIF", save_all=True, append_images=[BLUE]),
    "animated WebP": encode(red(), "WEBP", save_all=True, lossless=True, append_images=[BLUE]),
    "TIFF of two pages": encode(red(), "TIFF", save_all=True, append_images=[BLUE]),
    "animated PNG": encode(red(), "PNG", save_all=True, append_images=[BLUE]),
    "JPEG 2000": encode(red(), "JPEG2000"),
    **({"AVIF": encode(red(), "AVIF", quality=95)} if features.check("avif") else {}),
    "MPO of two pictures": encode(red(), "MPO", quality=95, save_all=True, append_images=[BLUE]),
    "Adobe's inverted CMYK JPEG": RED_CMYK_JPEG,
    "inverted CMYK JPEG without Adobe's marker": without_adobe_marker(RED_CMYK_JPEG),
    "YCCK JPEG": ycck_jpeg(),
    "16 bit RGB PNG": png(12, 10, 16, 2, (b"\0" + struct.pack(">3H", *(257 * v for v in RED)) * 12) * 10),
    "JPEG with garbage after its end": encode(red(), "JPEG", quality=95) + b"\0\xffgarbage" * 100,
    "PNG with a wrong checksum of its pixels": flip_bit(RED_PNG, RED_PNG.index(b"IEND") - 5),
    "PNG without its last chunk": RED_PNG[:-12],
    "JPEG with a colour profile": encode(red(), "JPEG", quality=95, icc_profile=PROFILE),
    "PNG with a broken colour profile": encode(red(), icc_profile=b"no profile"),
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
    "16 bit PGM": (encode(Image.fromarray(np.full((10, 12), 90 * 257, np.uint16)), "PPM"), 90),
    "12 bit PGM": (b"P5 12 10 4095\n" + struct.pack(">H", 1445) * 120, 90),
    "transparent 16 bit PNG": (encode(Image.fromarray(np.full((10, 12), 90 * 257, np.uint16)), transparency=90 * 257), 255),
    "16 bit PNG with another transparent grey": (
        encode(Image.fromarray(np.full((10, 12), 90 * 257, np.uint16)), transparency=90 * 257 + 1), 90
    ),
}


@pytest.mark.parametrize("kind", GREY_VALUE)
def test_grey_images(kind):
    data, value = GREY_VALUE[kind]
    pixels = decode_image(data)
    assert pixels.shape == (10, 12, 1) and pixels.dtype == np.uint8 and (pixels == value).all()


def two_colours() -> Image.Image:
    """A palette image: left half colour 0, black; right half colour 1, dark grey."""
    image = Image.new("P", (12, 10), 0)
    image.putpalette([0, 0, 0, 9, 9, 9])
    image.paste(1, (6, 0, 12, 10))
    return image


TRANSPARENT = {
    "RGBA PNG": encode(half_transparent("RGBA")),
    "LA PNG": encode(half_transparent("LA")),
    "palette PNG with a transparent index": encode(two_colours(), transparency=1),
    "palette PNG with alpha": encode(half_transparent("RGBA").quantize(4)),
    "16 bit LA PNG": png(12, 10, 16, 4, (b"\0" + struct.pack(">2H", 0, 65535) * 6 + bytes(24)) * 10),
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


def zip_of(data: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("image.png", data)
    return buffer.getvalue()


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
TURNED = Image.Exif()
TURNED[0x0112] = 6
HALF_GIF = encode(NOISE.quantize(64), "GIF")[:1500]
BAD = {
    "no bytes": (b"", "empty"),
    "text": (b"a caption of an image\n", "not-an-image"),
    "a page that says it is not there": (b"<!DOCTYPE html><html><h1>404 Not Found</h1></html>", "not-an-image"),
    "SVG": (b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><rect width="9"/></svg>', "not-an-image"),
    "PDF": (encode(red(), "PDF"), "not-an-image"),
    "PostScript": (encode(red(), "EPS"), "not-an-image"),
    "ZIP": (zip_of(RED_PNG), "not-an-image"),
    "zeros": (bytes(1000), "not-an-image"),
    "a header alone": (encode(NOISE, "JPEG")[:4], "not-an-image"),
    "half a JPEG": (encode(NOISE, "JPEG")[:2000], "truncated"),
    "half a PNG": (encode(NOISE, "PNG")[:6000], "truncated"),
    "a JPEG without its last two bytes": (encode(NOISE, "JPEG")[:-2], "truncated"),
    "half a TIFF": (encode(NOISE, "TIFF")[:6000], "truncated"),
    "half a BMP": (encode(NOISE, "BMP")[:6000], "truncated"),
    "half a GIF": (HALF_GIF, "truncated"),
    "half a WebP": (encode(NOISE, "WEBP", lossless=True)[:3000], "undecodable"),
    "a large bomb": (png(60_000, 60_000, 8, 2, bytes(100)), "decompression-bomb"),
    "a bomb that Pillow only warns of": (png(10_000, 10_000, 8, 2, bytes(100)), "decompression-bomb"),
    "a bomb GIF": (b"GIF89a" + struct.pack("<HH", 20_000, 20_000) + HALF_GIF[10:], "decompression-bomb"),
    "a PNG of no width": (png(0, 10, 8, 2, bytes(10)), "not-an-image"),
    "a JPEG of no width": (encode(NOISE, "JPEG").replace(b"\0\x40\0\x40", b"\0\x40\0\0", 1), "not-an-image"),
    "a PNG with a wrong checksum of its header": (flip_bit(RED_PNG, 8 + 8 + 13), "not-an-image"),
    "a PNG with a flipped bit in its pixels": (flip_bit(RED_PNG, RED_PNG.index(b"IDAT") + 10), "undecodable"),
    "32-bit integers": (encode(Image.fromarray(np.full((10, 12), 90 * 257, np.int32)), "TIFF"), "undecodable"),
    "floats": (encode(Image.fromarray(np.full((10, 12), 0.5, np.float32)), "TIFF"), "undecodable"),
    "a turned image of floats": (encode(Image.fromarray(np.full((10, 12), 0.5, np.float32)), "TIFF", exif=TURNED), "undecodable"),
    "noise that starts like a JPEG": (b"\xff\xd8\xff" + NOISE.tobytes()[:500], "not-an-image"),
    "noise that starts like a PNG": (RED_PNG[:8] + NOISE.tobytes()[:500], "not-an-image"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_content_is_named(case):
    data, kind = BAD[case]
    with pytest.raises(BadImage) as error:
        decode_image(data)
    assert error.value.kind == kind and error.value.message


@pytest.mark.parametrize("case", ["floats", "32-bit integers"])
def test_numbers_of_unknown_range_are_no_picture(case):
    with pytest.raises(BadImage, match=f"its pixels are {case}.* convert it to 8 or 16 bits"):
        decode_image(BAD[case][0])


def test_floats_are_a_map_of_numbers():
    assert (decode_number_map(BAD["floats"][0]) == 0.5).all()


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


MAP = npy(np.ones((24, 20), np.uint8))
BAD_MAPS = {
    "half an array": MAP[:300],
    "a header that is no Python": MAP.replace(b"(24, 20)", b"(24, 20 "),
    "a header with a stray quote": MAP.replace(b"False", b"Fals'"),
    "a shape that no memory holds": MAP.replace(b"(24, 20), }          ", b"(240000000000, 20), }"),
    "a shape that no number holds": MAP.replace(b"(24, 20), }                ", b"(24000000000000000000, 20)}"),
    "a type that is none": MAP.replace(b"|u1", b"|q1"),
    "objects": npy(np.array([{}])),
}


@pytest.mark.parametrize("case", BAD_MAPS)
@pytest.mark.parametrize("decode", [decode_label_map, decode_number_map])
def test_a_damaged_array_is_a_bad_image(case, decode):
    with pytest.raises(BadImage) as error:
        decode(BAD_MAPS[case])
    assert error.value.kind == "undecodable" and error.value.message


def test_postscript_is_not_handed_to_another_program(tmp_path, monkeypatch):
    called = tmp_path / "called"
    ghostscript = tmp_path / "gs"
    ghostscript.write_text(f"#!/bin/sh\ntouch {called}\n")
    ghostscript.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    with pytest.raises(BadImage):
        decode_image(BAD["PostScript"][0])
    assert not called.exists()


def test_the_ending_of_a_file_does_not_matter(tmp_path):
    (tmp_path / "photo.png").write_bytes(COLOUR["JPEG"])
    source = ImageFolder(SourceOptions(name="image-folder", path=str(tmp_path)), ImageOptions())
    (uri,) = source.list_images("train")["uri"].to_pylist()
    assert np.array_equal(source.decode(source.fetch(uri)).image, decode_image(COLOUR["JPEG"]))


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
