"""Small colour scenes, drawn: every kind of ground truth without a download.

A scene is a pure function of (seed, split, index, size). Its class is the index modulo the number of classes; place,
size, colours and extras vary. Segmentation, depth, keypoints and edges are exact: they are read off what was painted.
"""

import json

import numpy as np
import pyarrow as pa

from pipeline.sources.canvas import Canvas, hsv
from pipeline.sources.contract import Example, Split, check_listing, listing
from pipeline.sources.scene_painters import PAINTERS, SEGMENT_NAMES, Subject
from stages.errors import BadImage
from stages.options import ImageOptions, SourceOptions

__all__ = ["KEYPOINT_NAMES", "SEGMENT_NAMES", "Scenes", "render"]

KEYPOINT_NAMES = ("centre", "top", "left", "right", "base")
DEFAULT_NUM_IMAGES = {"train": 10_000, "holdout": 2_000}
HOLDOUT_IDS = 1 << 40


class Scenes:
    """Generated scenes of the size the configuration asks for. There are as many as `source.num_images` says."""

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
        spec = {"index": int(index), "seed": int(seed), "size": int(size), "split": split}
        return json.dumps(spec, sort_keys=True).encode()

    def decode(self, data: bytes) -> Example:
        try:
            spec = json.loads(data)
            return render(spec["seed"], spec["split"], spec["index"], spec["size"])
        except (ValueError, KeyError, TypeError) as error:
            raise BadImage("undecodable", f"not a scene: {error}") from error


def render(seed: int, split: Split, index: int, size: int) -> Example:
    """One scene.

    Returns:
        image uint8 (size, size, 3); conditions segmentation uint8 (size, size) of ids in SEGMENT_NAMES, depth float32
        (size, size) in [0, 1] with 0 near, edges uint8 (size, size) of 0 and 1, keypoints float32 (5, 3) of x, y and
        visible in the order of KEYPOINT_NAMES.
    """
    names = list(PAINTERS)
    random = np.random.Generator(np.random.Philox(key=[seed, (split == "holdout") << 48 | index]))
    canvas = Canvas(size)
    subject = PAINTERS[names[index % len(names)]](canvas, random)
    tint = np.asarray(hsv(random.uniform(0, 1), 0.08, 1.0), np.float32) * random.uniform(0.92, 1.05)
    canvas.colour *= tint
    segmentation, depth = canvas.maps()
    points = keypoints(canvas, subject)
    conditions = {"segmentation": segmentation, "depth": depth, "edges": edges(segmentation), "keypoints": points}
    return Example(canvas.pixels(), conditions)


def edges(segmentation: np.ndarray) -> np.ndarray:
    """1 where the pixel to the right or below belongs to another segment, uint8 (H, W)."""
    edge = np.zeros(segmentation.shape, dtype=np.uint8)
    edge[:, :-1] |= segmentation[:, :-1] != segmentation[:, 1:]
    edge[:-1] |= segmentation[:-1] != segmentation[1:]
    return edge


def keypoints(canvas: Canvas, subject: Subject) -> np.ndarray:
    """The subject's centre of area and its outermost points, float32 (5, 3): x and y in [0, 1], visible.

    An outermost point is the middle one of those that lie furthest out. It counts as not visible (0) where the subject
    runs out of the picture on that side, so that the true point lies outside.
    """
    is_subject = np.zeros(len(SEGMENT_NAMES), dtype=bool)
    is_subject[list(subject)] = True
    inside = is_subject[canvas.segment]
    per_column, per_row, n = inside.sum(0), inside.sum(1), len(inside)
    left, right = np.flatnonzero(per_column)[[0, -1]]
    top, base = np.flatnonzero(per_row)[[0, -1]]
    centre = np.average(np.arange(n), weights=per_column), np.average(np.arange(n), weights=per_row)
    points = [
        (*centre, True),
        (_middle(inside[top]), top, top > 0),
        (left, _middle(inside[:, left]), left > 0),
        (right, _middle(inside[:, right]), right < n - 1),
        (_middle(inside[base]), base, base < n - 1),
    ]
    return ((np.array(points, dtype=np.float32) + (0.5, 0.5, 0)) / (n, n, 1)).astype(np.float32)


def _middle(is_inside: np.ndarray) -> int:
    indices = np.flatnonzero(is_inside)
    return indices[len(indices) // 2]
