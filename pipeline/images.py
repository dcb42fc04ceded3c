"""Decoding: encoded bytes, whatever people store, to upright grey or RGB pixels, or maps of labels or numbers. Pillow throughout."""

import io
import struct
import warnings
from collections.abc import Callable

import numpy as np
from PIL import Image, UnidentifiedImageError, features

from stages.errors import BadImage

# Only formats decoded in this process: Pillow would hand others, such as EPS, to external programs. With the suffixes of their files.
FORMATS = {
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
    "JPEG2000": (".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"),
    "PNG": (".png", ".apng"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
}
if "avif" in features.modules and features.check("avif"):  # not in every build of Pillow
    FORMATS["AVIF"] = (".avif",)
SUFFIXES = tuple(suffix for suffixes in FORMATS.values() for suffix in suffixes)
# What decoders raise on damaged data.
DECODER_ERRORS = (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, RuntimeError, struct.error)
NPY_MAGIC, PNG_MAGIC = b"\x93NUMPY", b"\x89PNG\r\n\x1a\n"
STRETCH = {b"\2": 85, b"\4": 17}
# Whole numbers that stand for [0, 1], and which of them stands for 1.
HIGHEST = {np.dtype(bool): 1, np.dtype(np.uint8): 255, np.dtype(np.uint16): 65535}
ORIENTATION = 0x0112  # EXIF tag: how the camera was held
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode_image(data: bytes) -> np.ndarray:
    """Encoded bytes to uint8 pixels (H, W, 1) or (H, W, 3).

    EXIF orientation is applied, colour profiles (ICC) are not; transparency is laid on white, CMYK and palettes become RGB, 16-bit grey
    becomes 8-bit, and of an animation the first frame is taken.

    Raises:
        BadImage: empty, not-an-image, truncated, decompression-bomb (more than 89 million pixels) or undecodable, as are floats and 32-bit
            integers.
    """
    pixels = _decode(data, lambda image: np.asarray(_to_grey_or_rgb(image)))
    return pixels[..., None] if pixels.ndim == 2 else pixels


def decode_label_map(data: bytes) -> np.ndarray:
    """Encoded ids to integers (H, W): the values of a grey image, the indices of one with a palette, or an array as .npy.

    Raises:
        BadImage: as `decode_image`, or unfit-map (colours, or numbers that are not whole).
    """
    values = _decode_array(data) if data.startswith(NPY_MAGIC) else _decode(data, _map_values)
    if values.dtype.kind not in "iub":
        raise BadImage("unfit-map", f"a map of labels holds whole numbers, but this one holds {values.dtype}")
    return values.astype(np.int64) // _stretch(data)


def decode_number_map(data: bytes) -> np.ndarray:
    """Encoded numbers to float32 (H, W): whole numbers of 8 or 16 bits are scaled to [0, 1], others stay as they are.

    Raises:
        BadImage: as `decode_image`, or unfit-map (colours, or whole numbers of other widths).
    """
    values = _decode_array(data) if data.startswith(NPY_MAGIC) else _decode(data, _grey_values)
    if values.dtype.kind == "f":
        return values.astype(np.float32)
    values = values.astype(values.dtype.newbyteorder("="))
    if values.dtype not in HIGHEST:
        raise BadImage("unfit-map", f"a map of numbers holds floats or 8 or 16 bits, but this one holds {values.dtype}")
    return (values / HIGHEST[values.dtype]).astype(np.float32)


def _map_values(image: Image.Image) -> np.ndarray:
    if image.mode not in ("1", "L", "P", "I", "F") and not image.mode.startswith("I;16"):
        raise BadImage("unfit-map", f"a map has one channel, but this image is {image.mode}")
    return np.asarray(image)


def _grey_values(image: Image.Image) -> np.ndarray:
    if image.mode != "P":
        return _map_values(image)
    colors = np.asarray(image.convert("RGB"))
    if (colors != colors[..., :1]).any():
        raise BadImage("unfit-map", "a map of numbers is grey, but this image has colours")
    return colors[..., 0]


def _stretch(data: bytes) -> int:
    """What Pillow multiplies the values of a grey PNG of 2 or 4 bits by; 1 of others."""
    bits, is_grey = data[24:25], data[25:26] == b"\0"
    return STRETCH.get(bits, 1) if data.startswith(PNG_MAGIC) and is_grey else 1


def _decode_array(data: bytes) -> np.ndarray:
    try:
        values = np.load(io.BytesIO(data), allow_pickle=False)
    except Exception as error:  # numpy reads a damaged header as Python and believes its shape: anything may come of it
        raise BadImage("undecodable", str(error)) from error
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[..., 0]
    if values.ndim != 2:
        raise BadImage("unfit-map", f"a map is of shape (height, width), but this array is of {values.shape}")
    return values


def _decode(data: bytes, convert: Callable[[Image.Image], np.ndarray]) -> np.ndarray:
    """What `convert` makes of the upright image."""
    if not data:
        raise BadImage("empty", "the file has no bytes")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # damaged metadata around good pixels
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image: Image.Image = Image.open(io.BytesIO(data), formats=tuple(FORMATS))
            image.load()
            return convert(_upright(image))
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise BadImage("decompression-bomb", str(error)) from error
    except UnidentifiedImageError as error:
        raise BadImage("not-an-image", "no decoder knows these bytes") from error
    except DECODER_ERRORS as error:
        kind = "truncated" if "truncated" in str(error).lower() or isinstance(error, EOFError) else "undecodable"
        raise BadImage(kind, str(error)) from error


def _upright(image: Image.Image) -> Image.Image:
    # Not ImageOps.exif_transpose: it writes the other tags anew, and fails on photographs where one of them is odd.
    turn = TURNS.get(image.getexif().get(ORIENTATION, 1))
    return image if turn is None else image.transpose(turn)


def _to_grey_or_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode == "I" and image.format == "PPM":  # whose greys Pillow scales to 16 bits
        values = np.asarray(image).astype(np.int64)
        return Image.fromarray(np.where(values == image.info.get("transparency", -1), 255, values >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise BadImage(
            "undecodable",
            f"its pixels are {'floats' if image.mode == 'F' else '32-bit integers'}, of which nothing says what is white; convert it to 8 "
            f"or 16 bits, or name it as a map of numbers",
        )
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image if image.mode in ("L", "RGB") else image.convert("L" if image.mode == "1" else "RGB")
