"""Grids of records as the report page shows them: small enough to embed many, and cut by class."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

GAP = 2  # pixels between the tiles of a grid, see pipeline.grids
MAX_TILE = 96
MAX_PNG_BYTES = 150_000


@dataclass(frozen=True)
class Sheet:
    """A picture for the page.

    Attributes:
        uri: `data:` URI.
        width, height: in pixels.
        boxes: by class, where its tiles stand: left, top, width, height as shares of the picture. Empty where the tiles
            have no classes, or those of one class do not stand together.
    """

    uri: str
    width: int
    height: int
    boxes: Mapping[int, tuple[float, float, float, float]]


def make_sheet(png: bytes, layout: Mapping[str, Any] | None = None) -> Sheet:
    """A sheet of a grid's PNG.

    Args:
        png: from `pipeline.grids.grid_png`.
        layout: `num_columns` and `labels` of its tiles, row by row; without it the sheet is not cut.
    """
    with Image.open(io.BytesIO(png)) as image:
        boxes = _boxes(image.width, image.height, layout) if layout else {}
        tile = (image.width + GAP) // layout["num_columns"] - GAP if layout else 0
        if tile <= MAX_TILE and len(png) <= MAX_PNG_BYTES:
            return Sheet(_uri("png", png), image.width, image.height, boxes)
        scale = min(1.0, MAX_TILE / tile) if tile else min(1.0, 8 * MAX_TILE / image.width)
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        small = image.convert("RGB").resize(size, Image.Resampling.LANCZOS) if scale < 1.0 else image.convert("RGB")
        buffer = io.BytesIO()
        small.save(buffer, "WEBP", quality=85)
        return Sheet(_uri("webp", buffer.getvalue()), *size, boxes)


def _uri(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _boxes(width: int, height: int, layout: Mapping[str, Any]) -> dict[int, tuple[float, float, float, float]]:
    columns, labels = layout["num_columns"], layout["labels"]
    rows = -(-len(labels) // columns)
    pitch_x, pitch_y = (width + GAP) / columns, (height + GAP) / rows
    boxes = {}
    for label in sorted(set(labels) - {-1}):
        places = [place for place, other in enumerate(labels) if other == label]
        if not _stand_together(places, columns):
            return {}
        left, top = places[0] % columns * pitch_x, places[0] // columns * pitch_y
        boxes[label] = (
            left / width,
            top / height,
            (len(places) * pitch_x - GAP) / width,
            (pitch_y - GAP) / height,
        )
    return boxes


def _stand_together(places: Sequence[int], columns: int) -> bool:
    """Whether the places of a grid are neighbours in one row."""
    return places[-1] - places[0] + 1 == len(places) and places[0] // columns == places[-1] // columns
