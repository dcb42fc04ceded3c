"""Small colour scenes, drawn: every kind of ground truth without a download.

A scene is a pure function of (seed, split, index, size). Its class is the index modulo the number of classes; place, size, colours
and extras vary. Segmentation, depth, keypoints and edges are exact, because the painter knows what it painted.
"""

import json
from collections.abc import Callable

import numpy as np
import pyarrow as pa

from pipeline.sources.canvas import Canvas, hsv
from pipeline.sources.contract import Example, Split, check_listing, listing
from pipeline.sources.scene_painters import PAINTERS, SEGMENT_NAMES
from stages.errors import BadImage
from stages.options import ImageOptions, SourceOptions

__all__ = ["KEYPOINT_NAMES", "SEGMENT_NAMES", "Scenes", "render"]

KEYPOINT_NAMES = ("centre", "top", "left", "right", "base")
DEFAULT_NUM_IMAGES = {"train": 10_000, "holdout": 2_000}
HOLDOUT_IDS = 1 << 40


class Scenes:
    """Generated scenes of the size the configuration asks for. `source.num_images` says how many; there is no end of them."""

    class_names = tuple(PAINTERS)

    def __init__(self, options: SourceOptions, images: ImageOptions):
        self.options, self.size = options, images.size

    def list_images(self, split: Split) -> pa.Table:
        count = self.options.num_images if split == "train" else self.options.num_holdout_images
        index = np.arange(count or DEFAULT_NUM_IMAGES[split])
        uris = [f"scenes://{self.options.seed}/{split}/{i}/{self.size}" for i in index]
        ids = index + (HOLDOUT_IDS if split == "holdout" else 0)
        table = listing(ids, uris, (index % len(PAINTERS)).astype(np.int32))
        return check_listing(table, self.options, split)

    def fetch(self, uri: str) -> bytes:
        seed, split, index, size = uri.removeprefix("scenes://").split("/")
        return json.dumps({"index": int(index), "seed": int(seed), "size": int(size), "split": split}, sort_keys=True).encode()

    def decode(self, data: bytes) -> Example:
        try:
            spec = json.loads(data)
            return render(spec["seed"], spec["split"], spec["index"], spec["size"])
        except (ValueError, KeyError, TypeError) as error:
            raise BadImage("undecodable", f"not a scene: {error}") from error


def render(seed: int, split: Split, index: int, size: int) -> Example:
    """One scene.

    Returns:
        image uint8 (size, size, 3); conditions segmentation uint8 (size, size) of ids in SEGMENT_NAMES, depth float32 (size, size) in
        [0, 1] with 0 near, edges uint8 (size, size) of 0 and 1, keypoints float32 (5, 3) of x, y and visible.
    """
    names = list(PAINTERS)
    random = np.random.Generator(np.random.Philox(key=[seed, (split == "holdout") << 48 | index]))
    canvas = Canvas(size)
    painter: Callable = PAINTERS[names[index % len(names)]]
    box = painter(canvas, random)
    tint = np.asarray(hsv(random.uniform(0, 1), 0.08, 1.0), np.float32) * random.uniform(0.92, 1.05)
    canvas.colour *= tint
    segmentation, depth = canvas.maps()
    conditions = {"segmentation": segmentation, "depth": depth, "edges": edges(segmentation), "keypoints": keypoints(box)}
    return Example(canvas.pixels(), conditions)


def edges(segmentation: np.ndarray) -> np.ndarray:
    """1 where the pixel to the right or below belongs to another segment, uint8 (H, W)."""
    edge = np.zeros(segmentation.shape, dtype=np.uint8)
    edge[:, :-1] |= segmentation[:, :-1] != segmentation[:, 1:]
    edge[:-1] |= segmentation[:-1] != segmentation[1:]
    return edge


def keypoints(box: tuple[float, float, float, float]) -> np.ndarray:
    """Centre, top, left, right and base of the subject's box (x0, y0, x1, y1), float32 (5, 3): x, y, visible (inside the image)."""
    x0, y0, x1, y1 = box
    cx, cy = (x0 + x1) / 2, (y0 + y1) / 2
    points = np.array([(cx, cy), (cx, y0), (x0, cy), (x1, cy), (cx, y1)], dtype=np.float32)
    is_visible = ((points >= 0) & (points <= 1)).all(1)
    return np.column_stack([points, is_visible]).astype(np.float32)
