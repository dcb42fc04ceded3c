"""Image grids for people to look at."""

import io

import numpy as np
from PIL import Image


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
