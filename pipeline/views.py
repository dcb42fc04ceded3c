"""Views: the augmentations of an image that are stored. Each is a crop, mirrored or not, and one antialiased resize."""

import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from stages.errors import BadImage, ConfigError
from stages.hashing import hash64, uniform
from stages.options import ImageOptions

PREPROCESSING_VERSION = 2
GRAMMAR = "center, flip, ten-crop[@ENLARGE] or random-crop:N[@SHARE]"
CONFIGURED = re.compile(r"(ten-crop|random-crop:([0-9]+))(?:@([0-9]*\.?[0-9]+))?")
# What the number after @ is: its word, its value when left out, the bound it is above, and the bound it is at most.
PARAMETERS = {"ten-crop": ("ENLARGE", 1.1, 1, 4), "random-crop": ("SHARE", 0.8, 0, 1)}
MAX_RANDOM_CROPS = 1000
NUM_TRIES, NARROWEST, WIDEST = 10, 3 / 4, 4 / 3  # of a random crop: tries, and the aspect ratio's bounds
# Of the ten-crops: which share of the room lies above and to the left of each, and whether it is mirrored.
PLACES = [(*at, is_flipped) for is_flipped in (False, True) for at in ((0, 0), (0, 1), (1, 0), (1, 1), (0.5, 0.5))]


@dataclass(frozen=True)
class Crop:
    """A box in pixels of the upright source image, mirrored or not once it is cut out."""

    left: float
    top: float
    width: float
    height: float
    is_flipped: bool


@dataclass(frozen=True)
class View:
    """A stored view. `parameter` is ENLARGE of a ten-crop, SHARE of a random crop, and 0 for others."""

    kind: str
    parameter: float = 0.0
    index: int = 0

    @property
    def name(self) -> str:
        return f"{self.kind}@{self.parameter}/{self.index}" if self.kind in PARAMETERS else self.kind


def expand_views(names: Sequence[str]) -> tuple[str, ...]:
    """Views as they are configured to the names of the views that are stored, in order.

    center: the largest centred square. flip: its mirror image. ten-crop@1.1: `ten-crop@1.1/0` to `/9`, the corners (top
    left, top right, bottom left, bottom right) and the middle of that square scaled to 1.1 times `size`, then the same
    five mirrored. random-crop:2@0.8: `random-crop@0.8/0` and `/1`, random crops of at least that share of the image's
    area, each mirrored with probability one half. Without an @, 1.1 and 0.8 are meant.

    Raises:
        ConfigError: no view, an unknown one, a number out of range, or a view that is named twice.
    """
    try:
        views = [view.name for name in names for view in _expand(name)]
        if not views:
            raise ValueError(f"it must name at least one view. Use {GRAMMAR}")
        if repeated := [view for view in views if views.count(view) > 1]:
            raise ValueError(f"that names the view {repeated[0]} more than once. Name every view once")
    except ValueError as rule:
        raise ConfigError(f"images.views is {list(names)}, but {rule}.") from None
    return tuple(views)


def _expand(name: str) -> list[View]:
    if name in ("center", "flip"):
        return [View(name)]
    match = CONFIGURED.fullmatch(name)
    if match is None:
        raise ValueError(f"{name!r} is not a view. Use {GRAMMAR}")
    kind = match[1].partition(":")[0]
    word, default, low, high = PARAMETERS[kind]
    count, parameter = int(match[2] or len(PLACES)), float(match[3] or default)
    if not 1 <= count <= MAX_RANDOM_CROPS:
        raise ValueError(f"N of {name!r} must be from 1 to {MAX_RANDOM_CROPS}. Write e.g. {kind}:4")
    if not low < parameter <= high:
        raise ValueError(f"{word} of {name!r} must be above {low} and at most {high}. Write e.g. @{default}")
    return [View(kind, parameter, index) for index in range(count)]


def parse(name: str) -> View:
    """The stored view of that name, such as "flip" or "ten-crop@1.1/3". ValueError if there is none."""
    kind, _, numbers = name.partition("@")
    parameter, _, index = numbers.partition("/")
    view = View(kind, float(parameter or 0), int(index or 0))
    if kind not in CROPS or view.name != name:
        raise ValueError(f"{name!r} is not the name of a stored view")
    return view


def crop_of(view: str, image_id: int, height: int, width: int) -> Crop:
    """Where a stored view lies in an image of `height` x `width` pixels.

    Random crops follow from image_id and the view's name. Where none fits in ten tries, the centred square is taken.

    Raises:
        BadImage: too-small (a side of zero pixels).
        ValueError: no stored view has this name.
    """
    if 0 in (height, width):
        raise BadImage("too-small", f"the image has {width} x {height} pixels")
    parsed = parse(view)
    return CROPS[parsed.kind](parsed, image_id, height, width)


def _center(view: View, image_id: int, height: int, width: int) -> Crop:
    # From a whole pixel on: a square that already has the wanted size is then copied, not blurred by half a pixel.
    side = min(height, width)
    return Crop((width - side) // 2, (height - side) // 2, side, side, is_flipped=view.kind == "flip")


def _ten_crop(view: View, image_id: int, height: int, width: int) -> Crop:
    square = _center(view, image_id, height, width)
    down, right, is_flipped = PLACES[view.index]
    side = square.width / view.parameter
    room = square.width - side
    return Crop(square.left + right * room, square.top + down * room, side, side, is_flipped)


def _random_crop(view: View, image_id: int, height: int, width: int) -> Crop:
    name_hash = int.from_bytes(hashlib.blake2b(view.name.encode(), digest_size=8).digest(), "little")
    *tries, x, y, flip = uniform(hash64(image_id, name_hash, np.arange(2 * NUM_TRIES + 3))).tolist()
    for area, ratio in zip(tries[::2], tries[1::2], strict=True):
        area = (view.parameter + area * (1 - view.parameter)) * height * width
        ratio = NARROWEST * (WIDEST / NARROWEST) ** ratio
        w, h = math.sqrt(area * ratio), math.sqrt(area / ratio)
        if 1 <= w <= width and 1 <= h <= height:
            return Crop(x * (width - w), y * (height - h), w, h, is_flipped=flip < 0.5)
    return replace(_center(view, image_id, height, width), is_flipped=flip < 0.5)


CROPS = {"center": _center, "flip": _center, "ten-crop": _ten_crop, "random-crop": _random_crop}


def render(image: np.ndarray, crop: Crop, options: ImageOptions) -> np.ndarray:
    """The crop of uint8 (H, W, 1) or (H, W, 3), resized (bicubic, antialiased), as uint8 (size, size, channels).

    The filter sees the pixels around the box, too. ValueError if the box is not inside the image.
    """
    size, mode = options.size, "L" if options.channels == 1 else "RGB"
    pil = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    pixels = np.asarray(_resize(pil, crop, (size, size), Image.Resampling.BICUBIC).convert(mode))
    return _mirror(pixels, crop).reshape(size, size, options.channels)


def render_map(values: np.ndarray, crop: Crop, grid: tuple[int, int]) -> np.ndarray:
    """The crop of a condition map (H, W) of the image, one value per cell of the (h, w) grid of codes, as uint8 (h, w).

    Integers (ids, from 0 to 255) are taken at the middle of each cell. Floats (from 0 to 1) are averaged over the cell
    and become round(255 * mean).

    Raises:
        ValueError: the map is not 2-D or has values out of range.
    """
    if values.ndim != 2:
        raise ValueError(f"a condition map is 2-D, but this one has shape {values.shape}")
    is_float, (h, w) = values.dtype.kind == "f", grid
    high = 1 if is_float else 255
    if not ((values >= 0) & (values <= high)).all():
        raise ValueError(f"a condition map of {values.dtype} holds 0 to {high}, but this one has other values")
    if is_float:
        means = np.asarray(_resize(Image.fromarray(values.astype(np.float32)), crop, (w, h), Image.Resampling.BOX))
        return _mirror(np.rint(255 * means).astype(np.uint8), crop)
    rows = crop.top + (np.arange(h) + 0.5) * crop.height / h
    columns = crop.left + (np.arange(w) + 0.5) * crop.width / w
    return _mirror(values[np.ix_(rows.astype(int), columns.astype(int))].astype(np.uint8), crop)


def _resize(image: Image.Image, crop: Crop, size: tuple[int, int], resample: Image.Resampling) -> Image.Image:
    return image.resize(size, resample, box=(crop.left, crop.top, crop.left + crop.width, crop.top + crop.height))


def _mirror(pixels: np.ndarray, crop: Crop) -> np.ndarray:
    return np.ascontiguousarray(pixels[:, ::-1]) if crop.is_flipped else pixels


def apply_view(image: np.ndarray, view: str, options: ImageOptions, image_id: int = 0) -> np.ndarray:
    """A stored view of an image, uint8 (H, W, 1) or (H, W, 3), as uint8 (size, size, channels). See `crop_of`."""
    return render(image, crop_of(view, image_id, *image.shape[:2]), options)


def preprocessing_spec(options: ImageOptions) -> dict[str, object]:
    """What happens to pixels before the tokenizer, as it enters the identity of a code dataset."""
    return {
        "version": PREPROCESSING_VERSION,
        "size": options.size,
        "channels": options.channels,
        "crop": options.crop,
        "resize": "pillow-bicubic-antialias-box",
        "scaling": "x/127.5-1",
    }
