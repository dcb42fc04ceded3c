import numpy as np
import pytest
import torch
from torchmetrics.image.kid import poly_mmd

from evaluation.frechet import Reference
from evaluation.kernel_metrics import ClipMeanDiscrepancy, KernelDistance
from evaluation.set_metric import ReferenceSet
from evaluation.statistics import GaussianStatistics


def features(n: int, seed: int, shift: float = 0.0, d: int = 16) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=(n, d)) + shift).astype(np.float32)


def reference_of(values: np.ndarray) -> ReferenceSet:
    return ReferenceSet(Reference.of(GaussianStatistics.of(values)), values)


def test_kernel_distance_equals_torchmetrics_over_all_images():
    x, y = features(150, seed=1, shift=0.3), features(150, seed=2)
    metric = KernelDistance(16, reference=reference_of(y))
    metric.update(torch.from_numpy(x))
    theirs = poly_mmd(torch.from_numpy(x).double(), torch.from_numpy(y).double())
    assert float(metric.compute()) == pytest.approx(float(theirs), rel=1e-9)


def test_kernel_distance_is_unbiased_for_sets_of_unequal_size():
    reference = reference_of(features(600, seed=0))
    values = []
    for seed in range(1, 31):
        metric = KernelDistance(16, reference=reference)
        metric.update(torch.from_numpy(features(40, seed=seed)))
        values.append(float(metric.compute()))
    assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(len(values))
    assert min(values) < 0 < max(values)


def test_cmmd_is_the_published_formula():
    """Written out as in the paper: 1000 (mean k(x, x') + mean k(y, y') - 2 mean k(x, y)), diagonal included."""
    x, y = features(90, seed=1, shift=0.5), features(70, seed=2)
    metric = ClipMeanDiscrepancy(16, num_blocks=3, reference=reference_of(y))
    metric.update(torch.from_numpy(x), torch.arange(90) % 3)
    a, b = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (x.astype(np.float64), y.astype(np.float64)))

    def mean_kernel(u: np.ndarray, v: np.ndarray) -> float:
        squared = np.square(u[:, None] - v[None]).sum(-1)
        return float(np.exp(-squared / (2 * 10.0**2)).mean())

    expected = 1000 * (mean_kernel(a, a) + mean_kernel(b, b) - 2 * mean_kernel(a, b))
    estimate = metric.estimates()[""]
    assert estimate.value == pytest.approx(expected, rel=1e-6)
    assert estimate.standard_error > 0 and estimate.bias_corrected < estimate.value


def test_leaving_out_a_block_is_measuring_without_it():
    x, y = features(60, seed=1, shift=0.3), features(50, seed=2)
    for cls in (KernelDistance, ClipMeanDiscrepancy):
        metric = cls(16, num_blocks=2, reference=reference_of(y))
        metric.update(torch.from_numpy(x), torch.arange(60) % 2)
        halves = []
        for half in (x[1::2], x[::2]):
            alone = cls(16, reference=reference_of(y))
            alone.update(torch.from_numpy(half))
            halves.append(float(alone.compute()))
        estimate = metric.estimates()[""]
        assert estimate.bias_corrected == pytest.approx(2 * estimate.value - np.mean(halves), rel=1e-9)
        assert estimate.standard_error == pytest.approx(abs(halves[0] - halves[1]) / 2, rel=1e-9)
