"""Metrics of reconstructed maps of labels, over two uint8 arrays of ids (n, H, W, 1)."""

import numpy as np


def pixel_accuracy(labels: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Share of the pixels of each image with the right label, float64 (n,)."""
    return (labels == others).mean(axis=(1, 2, 3))


def overlaps(labels: np.ndarray, others: np.ndarray, num_labels: int) -> np.ndarray:
    """Pixels of each label in both maps, and in at least one of them, int64 (n, num_labels, 2)."""
    n = len(labels)
    image = num_labels * np.arange(n)[:, None, None, None]
    first, second = image + labels, image + others
    both, in_first, in_second = (
        np.bincount(ids.reshape(-1), minlength=n * num_labels).reshape(n, num_labels) for ids in (first[first == second], first, second)
    )
    return np.stack([both, in_first + in_second - both], axis=-1)


def mean_iou(overlap: np.ndarray) -> float:
    """Intersection over union, averaged over the labels that occur, of summed `overlaps` (num_labels, 2).

    As segmentation is measured: over all images together (Everingham et al. 2015, section 3.3), not image by image.
    """
    both, either = overlap[overlap[:, 1] > 0].T
    return float(np.mean(both / either))
