"""Scenes: deterministic, varied, and with ground truth that agrees with the picture."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.sources.scenes import KEYPOINT_NAMES, SEGMENT_NAMES, Scenes, edges, render
from stages.options import ImageOptions, SourceOptions

NUM_CLASSES = len(Scenes.class_names)
indices = st.integers(0, 10**6)
sizes = st.sampled_from([16, 17, 32, 48])
few = settings(max_examples=40, deadline=None)


@few
@given(seed=st.integers(0, 2**31), index=indices, size=sizes, split=st.sampled_from(["train", "holdout"]))
def test_a_scene_is_a_pure_function_of_its_description(seed, index, size, split):
    first, second = render(seed, split, index, size), render(seed, split, index, size)
    assert np.array_equal(first.image, second.image)
    for name, values in first.conditions.items():
        assert np.array_equal(values, second.conditions[name])


@few
@given(index=indices, size=sizes)
def test_shapes_types_and_ranges(index, size):
    example = render(0, "train", index, size)
    conditions = example.conditions
    assert set(conditions) == {"segmentation", "depth", "edges", "keypoints"}
    assert example.image.shape == (size, size, 3) and example.image.dtype == np.uint8
    assert conditions["segmentation"].shape == (size, size) and conditions["segmentation"].dtype == np.uint8
    assert conditions["segmentation"].max() < len(SEGMENT_NAMES)
    assert conditions["depth"].shape == (size, size) and conditions["depth"].dtype == np.float32
    assert 0 <= conditions["depth"].min() <= conditions["depth"].max() <= 1
    assert conditions["edges"].shape == (size, size) and set(np.unique(conditions["edges"])) <= {0, 1}
    points = conditions["keypoints"]
    assert points.shape == (len(KEYPOINT_NAMES), 3) and points.dtype == np.float32
    assert (points[:, :2] >= 0).all() and (points[:, :2] <= 1).all() and set(points[:, 2]) <= {0, 1}


@few
@given(index=indices)
def test_edges_lie_exactly_where_the_segment_changes(index):
    conditions = render(0, "train", index, 32).conditions
    segmentation, edge = conditions["segmentation"].astype(int), conditions["edges"]
    for y in range(32):
        for x in range(32):
            neighbours = [segmentation[y, x + 1]] if x < 31 else []
            neighbours += [segmentation[y + 1, x]] if y < 31 else []
            assert edge[y, x] == any(other != segmentation[y, x] for other in neighbours)


@few
@given(index=indices)
def test_a_change_of_depth_is_never_inside_the_sky(index):
    conditions = render(0, "train", index, 32).conditions
    sky = conditions["segmentation"] == SEGMENT_NAMES.index("sky")
    assert (conditions["depth"][sky] == 1.0).all()
    assert conditions["depth"].min() < 1.0


SUBJECT_OF = {"sunset": {"sun or moon"}, "fish": {"animal", "spot"}, "tree": {"trunk or stem", "foliage"}}


@few
@given(name=st.sampled_from(sorted(SUBJECT_OF)), number=st.integers(0, 10**5))
def test_keypoints_are_the_outermost_points_of_the_subject(name, number):
    index = Scenes.class_names.index(name) + number * NUM_CLASSES
    points = dict(zip(KEYPOINT_NAMES, render(0, "train", index, 32).conditions["keypoints"]))
    # The map of three times the size shows every sample behind the smaller picture.
    wanted = [SEGMENT_NAMES.index(segment) for segment in SUBJECT_OF[name]]
    y, x = np.nonzero(np.isin(render(0, "train", index, 96).conditions["segmentation"], wanted))
    inside = set(zip(x.tolist(), y.tolist()))
    ends = {"top": (1, y.min()), "base": (1, y.max()), "left": (0, x.min()), "right": (0, x.max())}
    for end, (axis, extreme) in ends.items():
        assert points[end][axis] == pytest.approx((extreme + 0.5) / 96)
        assert tuple((points[end][:2] * 96).astype(int).tolist()) in inside
        assert points[end][2] == (0 < extreme < 95)
    assert points["centre"].tolist() == pytest.approx([(x.mean() + 0.5) / 96, (y.mean() + 0.5) / 96, 1], abs=1e-5)


def test_a_subject_that_leaves_the_picture_has_an_invisible_end():
    flower = render(0, "train", Scenes.class_names.index("flower"), 32)
    assert dict(zip(KEYPOINT_NAMES, flower.conditions["keypoints"]))["base"][2] == 0


def test_a_larger_scene_is_the_same_scene():
    small, large = render(0, "train", 5, 16), render(0, "train", 5, 64)
    shrunk = large.image.reshape(16, 4, 16, 4, 3).mean((1, 3))
    assert np.abs(shrunk - small.image).mean() < 4
    agreement = (large.conditions["segmentation"][2::4, 2::4] == small.conditions["segmentation"]).mean()
    assert agreement > 0.95


def test_splits_and_seeds_show_different_images():
    pictures = [render(seed, split, 0, 32).image for seed in (0, 1) for split in ("train", "holdout")]
    for i, picture in enumerate(pictures):
        assert all(not np.array_equal(picture, other) for other in pictures[i + 1 :])


def test_every_class_varies_and_classes_differ():
    images = np.stack([render(0, "train", i, 16).image for i in range(12 * NUM_CLASSES)]).astype(float)
    by_class = images.reshape(12, NUM_CLASSES, -1)
    assert (by_class.std(0).mean(1) > 4).all()
    means = by_class[:8].mean(0)
    distance = ((by_class[8:, :, None] - means[None, None]) ** 2).mean(-1)
    assert (distance.argmin(-1) == np.arange(NUM_CLASSES)).mean() > 0.8


def test_the_listing_is_balanced_and_says_how_to_draw_each_scene():
    source = Scenes(SourceOptions(num_images=50, seed=3), ImageOptions(size=24))
    table = source.list_images("train")
    assert np.bincount(table["label"].to_numpy()).tolist() == [5] * NUM_CLASSES
    data = source.fetch(table["uri"][7].as_py())
    assert data == b'{"index": 7, "seed": 3, "size": 24, "split": "train"}'
    assert np.array_equal(source.decode(data).image, render(3, "train", 7, 24).image)


def test_edges_of_one_segment_are_none():
    assert edges(np.zeros((5, 6), dtype=np.uint8)).sum() == 0


@pytest.mark.parametrize("size", [16, 512])
def test_the_smallest_and_the_largest_size(size):
    assert render(0, "train", 9, size).image.shape == (size, size, 3)
