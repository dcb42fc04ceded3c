"""A painter's canvas: shapes laid from far to near, with exact segmentation and depth as a by-product.

Coordinates run from 0 to 1 from the left and from the top. Colours are sampled 3 x 3 per pixel and averaged; maps are
those of the middle sample, so they are exact at pixel centres.
"""

import colorsys

import numpy as np

SUBSAMPLES = 3

Colour = tuple[float, float, float]


class Canvas:
    """Colour, segment and depth of every sample of a square image of `size` pixels."""

    def __init__(self, size: int):
        n = size * SUBSAMPLES
        axis = (np.arange(n, dtype=np.float32) + 0.5) / n
        self.x, self.y = np.broadcast_arrays(axis[None, :], axis[:, None])
        self.colour = np.zeros((n, n, 3), dtype=np.float32)
        self.segment = np.zeros((n, n), dtype=np.uint8)
        self.depth = np.ones((n, n), dtype=np.float32)

    def paint(self, mask: np.ndarray, colour: Colour | np.ndarray, segment: int, depth: float) -> None:
        """Covers the samples of `mask` (bool (n, n)) with a colour in [0, 1], or with those of an array (n, n, 3)."""
        self.colour[mask] = colour[mask] if isinstance(colour, np.ndarray) else colour
        self.segment[mask] = segment
        self.depth[mask] = depth

    def gradient(self, top: Colour, bottom: Colour, y0: float = 0.0, y1: float = 1.0) -> np.ndarray:
        """Colours that go from `top` at y0 to `bottom` at y1."""
        t = ((self.y - y0) / (y1 - y0)).clip(0, 1)[..., None]
        return (1 - t) * np.asarray(top, np.float32) + t * np.asarray(bottom, np.float32)

    def ellipse(self, cx: float, cy: float, rx: float, ry: float) -> np.ndarray:
        return ((self.x - cx) / rx) ** 2 + ((self.y - cy) / ry) ** 2 <= 1

    def rectangle(self, x0: float, y0: float, x1: float, y1: float) -> np.ndarray:
        return (self.x >= x0) & (self.x <= x1) & (self.y >= y0) & (self.y <= y1)

    def polygon(self, *points: tuple[float, float]) -> np.ndarray:
        """Inside of a polygon by the even-odd rule."""
        inside = np.zeros(self.x.shape, dtype=bool)
        for (x0, y0), (x1, y1) in zip(points, (*points[1:], points[0])):
            if y0 != y1:
                inside ^= ((self.y < y0) != (self.y < y1)) & (self.x < x0 + (self.y - y0) * (x1 - x0) / (y1 - y0))
        return inside

    def below(self, height: float, amplitude: float = 0.0, frequency: float = 1.0, phase: float = 0.0) -> np.ndarray:
        """Everything below a wavy horizon."""
        return self.y >= height + amplitude * np.sin(2 * np.pi * frequency * self.x + phase)

    def pixels(self) -> np.ndarray:
        """The image, uint8 (size, size, 3)."""
        size = len(self.colour) // SUBSAMPLES
        mean = self.colour.reshape(size, SUBSAMPLES, size, SUBSAMPLES, 3).mean((1, 3))
        return (mean * 255 + 0.5).clip(0, 255).astype(np.uint8)

    def maps(self) -> tuple[np.ndarray, np.ndarray]:
        """Segment uint8 and depth float32 at pixel centres, both (size, size)."""
        middle = slice(SUBSAMPLES // 2, None, SUBSAMPLES)
        return self.segment[middle, middle].copy(), self.depth[middle, middle].copy()


def hsv(h: float, s: float, v: float) -> Colour:
    """Colour of a hue (any real, period 1), saturation and value in [0, 1]."""
    return colorsys.hsv_to_rgb(h % 1, s, v)
