import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torchmetrics.image.fid import FrechetInceptionDistance

from evaluation.frechet import FrechetDistance, Reference, covariance_factor, frechet_distance, frechet_estimate
from evaluation.statistics import GaussianStatistics


class MeanPool(torch.nn.Module):
    """A fixed linear map of pixels to 12 features, for both our metric and torchmetrics'."""

    num_features = 12

    def __init__(self):
        super().__init__()
        self.weight = torch.randn(3 * 8 * 8, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.double().flatten(1) @ self.weight / 100


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


def test_equals_torchmetrics_on_the_same_extractor():
    generator = torch.Generator().manual_seed(3)
    real = torch.randint(0, 256, (60, 3, 8, 8), generator=generator, dtype=torch.uint8)
    fake = torch.randint(20, 230, (60, 3, 8, 8), generator=generator, dtype=torch.uint8)
    theirs = FrechetInceptionDistance(feature=MeanPool(), input_img_size=(3, 8, 8)).set_dtype(torch.float64)
    theirs.update(real, real=True)
    theirs.update(fake, real=False)
    ours = FrechetDistance(Reference.of(GaussianStatistics.of(MeanPool()(real).numpy())))
    ours.update(MeanPool()(fake))
    assert float(ours.compute()) == pytest.approx(float(theirs.compute()), rel=1e-6)


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


@pytest.mark.parametrize("num_shards", [1, 3, 8])
def test_metric_merged_over_shards_equals_the_whole(num_shards):
    reference = Reference.of(statistics(500, 12, seed=2))
    values = torch.from_numpy(features(333, 12, seed=1, shift=0.5))
    whole = FrechetDistance(reference)
    whole.update(values)
    first, *rest = (FrechetDistance(reference) for _ in range(num_shards))
    for metric, shard in zip([first, *rest], values.tensor_split(num_shards), strict=True):
        metric.update(shard)
    for metric in rest:
        first.merge_state(metric)
    assert first.statistics.n == 333
    torch.testing.assert_close(first.compute(), whole.compute(), rtol=1e-12, atol=1e-12)


def test_metric_state_survives_saving_and_reset():
    reference = Reference.of(statistics(500, 12, seed=2))
    metric = FrechetDistance(reference, extractor=lambda images: MeanPool()(torch.from_numpy(images)).numpy())
    metric.update(torch.randint(0, 256, (30, 8, 8, 3), dtype=torch.uint8))
    restored = FrechetDistance(reference)
    restored.load_state_dict(metric.state_dict())
    assert restored.statistics.n == 30
    assert restored.compute() == metric.compute()
    metric.reset()
    assert metric.statistics.n == 0


def test_metric_reduces_over_processes_like_torchmetrics_does():
    reference = Reference.of(statistics(500, 12, seed=2))
    values = torch.from_numpy(features(100, 12, seed=1))
    shards = [FrechetDistance(reference) for _ in range(4)]
    for metric, shard in zip(shards, values.tensor_split(4), strict=True):
        metric.update(shard)
    gathered = [metric.moments for metric in shards]
    synced = FrechetDistance(
        reference, dist_sync_fn=lambda tensor, group: gathered, distributed_available_fn=lambda: True
    )
    synced.update(values[:25])
    expected = frechet_distance(GaussianStatistics.of(values.numpy()), reference)
    assert float(synced.compute()) == pytest.approx(expected, rel=1e-12)
