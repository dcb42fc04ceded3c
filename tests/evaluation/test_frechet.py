import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torchmetrics.image.fid import _compute_fid

from evaluation.frechet import Reference, congruence, covariance_factor, frechet_distance, frechet_estimate
from evaluation.statistics import GaussianStatistics


def features(n: int, d: int, seed: int, shift: float = 0.0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return generator.normal(size=(n, d)) @ np.diag(np.linspace(0.2, 2.0, d)) + shift


def statistics(*args, **kwargs) -> GaussianStatistics:
    return GaussianStatistics.of(features(*args, **kwargs))


def textbook(a: GaussianStatistics, b: GaussianStatistics) -> float:
    root = sqrtm(a.covariance @ b.covariance)
    return float(np.sum((a.mean - b.mean) ** 2) + np.trace(a.covariance + b.covariance - 2 * root.real))


@pytest.mark.parametrize("n", [40, 200, 3000])
def test_equals_the_matrix_square_root_formula(n):
    a, b = statistics(n, 32, seed=1, shift=0.3), statistics(n, 32, seed=2)
    assert frechet_distance(a, Reference.of(b)) == pytest.approx(textbook(a, b), rel=1e-8)


@pytest.mark.parametrize("num_reference", [30, 500])
def test_products_in_blocks_are_those_of_whole_matrices(num_reference, monkeypatch):
    monkeypatch.setattr("evaluation.frechet.BLOCK_SIZE", 16)  # three by three blocks of 40 channels, two by two of rank 29
    a, b = statistics(300, 40, seed=1, shift=0.3), statistics(num_reference, 40, seed=2)
    factor = torch.from_numpy(covariance_factor(b.covariance))
    moments = torch.from_numpy(a.m2)
    torch.testing.assert_close(congruence(moments, factor).tril(), (factor.T @ moments @ factor).tril(), rtol=1e-12, atol=1e-12)
    assert frechet_distance(a, Reference.of(b)) == pytest.approx(textbook(a, b), rel=1e-6)


def test_equals_torchmetrics_on_the_same_moments():
    a, b = statistics(600, 48, seed=1, shift=0.3), statistics(500, 48, seed=2)
    theirs = _compute_fid(*(torch.from_numpy(x) for s in (a, b) for x in (s.mean, s.covariance)))
    assert frechet_distance(a, Reference.of(b)) == pytest.approx(float(theirs), rel=1e-6)


def test_known_distance_of_two_shifted_scaled_gaussians():
    d = 6
    a = GaussianStatistics(3, np.full(d, 2.0), np.eye(d) * 2 * 9.0)
    b = GaussianStatistics(3, np.zeros(d), np.eye(d) * 2 * 1.0)
    assert frechet_distance(a, Reference.of(b)) == pytest.approx(d * (4.0 + (3.0 - 1.0) ** 2))


def test_is_symmetric_and_nothing_to_itself():
    a, b = statistics(500, 24, seed=1, shift=0.2), statistics(400, 24, seed=2)
    assert frechet_distance(a, Reference.of(b)) == pytest.approx(frechet_distance(b, Reference.of(a)), rel=1e-9)
    assert frechet_distance(a, Reference.of(a)) == pytest.approx(0.0, abs=1e-6)


def test_fewer_images_than_features_is_no_special_case():
    few, many = statistics(20, 64, seed=1), statistics(1000, 64, seed=2)
    assert covariance_factor(few.covariance).shape == (64, 19)
    assert frechet_distance(few, Reference.of(many)) == pytest.approx(
        frechet_distance(many, Reference.of(few)), rel=1e-6
    )


def test_collapsed_images_have_a_finite_distance():
    same = GaussianStatistics.of(np.ones((50, 8)))
    b = statistics(100, 8, seed=2)
    expected = np.sum((1.0 - b.mean) ** 2) + np.trace(b.covariance)
    assert frechet_distance(same, Reference.of(b)) == pytest.approx(expected)


def test_jackknife_error_and_correction_match_repeated_draws():
    d, n, repeats = 16, 400, 40
    reference = Reference.of(
        GaussianStatistics(10**6, np.full(d, 0.1), np.diag(np.linspace(0.2, 2.0, d) ** 2) * (10**6 - 1))
    )
    truth = d * 0.1**2
    estimates = []
    for repeat in range(repeats):
        blocks = np.array_split(features(n, d, seed=100 + repeat), 10)
        estimates.append(frechet_estimate([GaussianStatistics.of(block) for block in blocks], reference, num_threads=2))
    plain = np.array([estimate.value for estimate in estimates])
    corrected = np.array([estimate.bias_corrected for estimate in estimates])
    assert abs(corrected.mean() - truth) < 0.15 * (plain.mean() - truth)
    assert np.mean([estimate.standard_error for estimate in estimates]) == pytest.approx(plain.std(ddof=1), rel=0.4)
    assert estimates[0].num_samples == n


@pytest.mark.filterwarnings("error")
def test_arrays_that_came_through_ray_serve_too():
    """They cannot be written to, which torch warns of where they are not copied."""
    first, second = (GaussianStatistics.of(np.random.default_rng(seed).normal(size=(60, 5))) for seed in (0, 1))
    reference = Reference.of(first)
    expected = frechet_distance(second, reference)
    for array in (second.m2, second.mean, reference.factor, reference.mean):
        array.setflags(write=False)
    assert frechet_distance(second, reference) == expected
