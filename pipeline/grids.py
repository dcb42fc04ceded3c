"""Image grids for people to look at."""

import io

import numpy as np
from PIL import Image

GOLDEN_ANGLE = 137.508  # degrees


def label_colors(ids: np.ndarray) -> np.ndarray:
    """Ids uint8 (…, 1) as colours uint8 (…, 3): neighbouring ids far apart in hue, 0 dark."""
    numbers = np.arange(256)
    hue, value = numbers * GOLDEN_ANGLE % 360, 1 - 0.25 * (numbers // 8 % 3)
    channels = [np.clip(np.abs((hue + shift) / 60 % 6 - 3) - 1, 0, 1) for shift in (0, 240, 120)]
    palette = np.stack([255 * value * (0.35 + 0.65 * channel) for channel in channels], axis=-1).astype(np.uint8)
    palette[0] = 40
    return palette[ids[..., 0]]


def default_columns(num_images: int) -> int:
    """Columns of a grid that is about square."""
    return int(np.ceil(np.sqrt(num_images)))


def grid_png(images: np.ndarray, num_columns: int | None = None, zoom: int | None = None, gap: int = 2) -> bytes:
    """A PNG of uint8 images (n, H, W, C) row by row, on white; small images are enlarged by whole factors.

    Args:
        num_columns: about the square root of n if not given.
        zoom: nearest-neighbour factor; enough for tiles of 64 pixels if not given.
        gap: pixels between tiles, after zooming.
    """
    n, h, w, channels = images.shape
    columns = num_columns or default_columns(n)
    factor = zoom or max(1, 64 // h)
    tiles = images.repeat(factor, axis=1).repeat(factor, axis=2)
    rows = -(-n // columns)
    sheet = np.full((rows * (h * factor + gap) - gap, columns * (w * factor + gap) - gap, channels), 255, np.uint8)
    for i, tile in enumerate(tiles):
        y, x = i // columns * (h * factor + gap), i % columns * (w * factor + gap)
        sheet[y : y + h * factor, x : x + w * factor] = tile
    buffer = io.BytesIO()
    Image.fromarray(sheet[..., 0] if channels == 1 else sheet).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
