"""Metrics of maps of labels, against their definitions."""

import numpy as np
import pytest

from evaluation.label_metrics import mean_iou, overlaps, pixel_accuracy

K = 7


def maps(seed: int, n: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, K - 1, (n, 6, 6, 1)).astype(np.uint8)  # the last label never occurs


def test_overlaps_count_pixels_label_by_label():
    labels, others = maps(0), maps(1)
    found = overlaps(labels, others, K)
    assert found.shape == (5, K, 2) and found.dtype == np.int64
    for image in range(5):
        for label in range(K):
            first, second = labels[image] == label, others[image] == label
            assert found[image, label].tolist() == [(first & second).sum(), (first | second).sum()]


def test_mean_iou_is_over_all_images_and_the_labels_that_occur():
    labels, others = maps(0), maps(1)
    each = [
        ((labels == k) & (others == k)).sum() / ((labels == k) | (others == k)).sum() for k in range(K - 1)
    ]
    assert mean_iou(overlaps(labels, others, K).sum(axis=0)) == pytest.approx(np.mean(each))
    assert mean_iou(overlaps(labels, labels, K).sum(axis=0)) == 1


def test_pixel_accuracy_is_per_image():
    labels = maps(0)
    others = labels.copy()
    others[1, 0, :3] = K - 1
    assert pixel_accuracy(labels, others).tolist() == [1, pytest.approx(33 / 36), 1, 1, 1]


def test_no_images_are_no_error():
    empty = maps(0)[:0]
    assert overlaps(empty, empty, K).shape == (0, K, 2) and pixel_accuracy(empty, empty).shape == (0,)
