"""Image operations: decoding, conversion, crops and views. Pillow throughout; resizing is antialiased."""

import io
import warnings
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from stages.errors import BadImage
from stages.options import ImageOptions

MAX_PIXELS = 178_956_970  # beyond this Pillow itself speaks of a decompression bomb
PREPROCESSING_VERSION = 1


def decode_image(data: bytes) -> np.ndarray:
    """Encoded bytes to uint8 pixels (H, W, 1) or (H, W, 3).

    EXIF orientation is applied, transparency is laid on white, CMYK and palettes become RGB, 16-bit grey becomes 8-bit, and of an
    animation the first frame is taken.

    Raises:
        BadImage: empty, not-an-image, truncated, decompression-bomb or undecodable.
    """
    if not data:
        raise BadImage("empty", "the file has no bytes")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data))
            image.load()
            image = ImageOps.exif_transpose(image)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise BadImage("decompression-bomb", str(error)) from error
    except UnidentifiedImageError as error:
        raise BadImage("not-an-image", "no decoder knows these bytes") from error
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError) as error:
        kind = "truncated" if "truncated" in str(error).lower() or isinstance(error, EOFError) else "undecodable"
        raise BadImage(kind, str(error)) from error
    pixels = np.asarray(_to_grey_or_rgb(image))
    return pixels[..., None] if pixels.ndim == 2 else pixels


def _to_grey_or_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode == "I":
        values = np.asarray(image).astype(np.int64)
        return Image.fromarray((values.clip(0, 65535) >> 8).astype(np.uint8))
    if image.mode == "F":
        return Image.fromarray(np.asarray(image).clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image if image.mode in ("L", "RGB") else image.convert("L" if image.mode == "1" else "RGB")


def center_crop(image: np.ndarray, options: ImageOptions) -> np.ndarray:
    """Shorter side to `size` (bicubic, antialiased), then the middle square, in the wanted number of channels.

    Args:
        image: uint8 (H, W, 1) or (H, W, 3).

    Returns:
        uint8 (size, size, channels).

    Raises:
        BadImage: a side of zero pixels.
    """
    if 0 in image.shape[:2]:
        raise BadImage("too-small", f"the image has {image.shape[1]} x {image.shape[0]} pixels")
    pil = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).convert("L" if options.channels == 1 else "RGB")
    size, (w, h) = options.size, pil.size
    scale = size / min(w, h)
    w, h = max(size, round(w * scale)), max(size, round(h * scale))
    if (w, h) != pil.size:
        pil = pil.resize((w, h), Image.Resampling.BICUBIC)
    x, y = (w - size) // 2, (h - size) // 2
    return np.asarray(pil.crop((x, y, x + size, y + size))).reshape(size, size, options.channels)


def _flip(image: np.ndarray, options: ImageOptions) -> np.ndarray:
    return np.ascontiguousarray(center_crop(image, options)[:, ::-1])


VIEWS: dict[str, Callable[[np.ndarray, ImageOptions], np.ndarray]] = {"center": center_crop, "flip": _flip}


def apply_view(image: np.ndarray, view: str, options: ImageOptions) -> np.ndarray:
    """One precomputed augmentation of an image, uint8 (size, size, channels)."""
    return VIEWS[view](image, options)


def preprocessing_spec(options: ImageOptions) -> dict[str, object]:
    """What happens to pixels before the tokenizer, as it enters the identity of a code dataset."""
    return {
        "version": PREPROCESSING_VERSION,
        "size": options.size,
        "channels": options.channels,
        "crop": options.crop,
        "resize": "pillow-bicubic-antialias",
        "scaling": "x/127.5-1",
    }
