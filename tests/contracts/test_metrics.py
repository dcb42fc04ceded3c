"""What every metric of sets of images must keep. A new entry in SET_METRICS is tested by being registered."""

import numpy as np
import pytest
import torch

from evaluation.frechet import Reference
from evaluation.metrics import SET_METRICS
from evaluation.set_metric import SAMPLES, ReferenceSet, SetMetric
from evaluation.statistics import GaussianStatistics

D, N, K = 12, 200, 5


def images(n: int, seed: int, shift: float = 0.0) -> np.ndarray:
    """Features float32 (n, D) of images that share a distribution unless shifted."""
    spread = np.linspace(0.5, 2.0, D)
    return (np.random.default_rng(seed).normal(size=(n, D)) * spread + shift).astype(np.float32)


@pytest.fixture(scope="module")
def reference() -> ReferenceSet:
    features = images(300, seed=0)
    return ReferenceSet(Reference.of(GaussianStatistics.of(features)), features)


@pytest.fixture(params=sorted(SET_METRICS))
def make(request, reference):
    cls = SET_METRICS[request.param].cls

    def make(num_blocks: int = K, **options) -> SetMetric:
        return cls(D, num_blocks, reference=reference, **options)

    return make


def fed(metric: SetMetric, features: np.ndarray, cuts: int = 1) -> SetMetric:
    blocks = np.arange(len(features)) % metric.num_blocks
    for rows in np.array_split(np.arange(len(features)), cuts):
        metric.update(torch.from_numpy(features[rows]), torch.from_numpy(blocks[rows]))
    return metric


def test_values_have_errors_that_shrink_with_the_number_of_images(make):
    few, many = (
        [fed(make(), images(n, seed=seed, shift=0.5)).estimates() for seed in range(1, 5)] for n in (N, 4 * N)
    )
    assert few[0].keys() == many[0].keys() == set(make().parts)
    for name, estimate in few[0].items():
        assert np.isfinite(estimate.value) and estimate.num_samples == N
        assert all(found[name].standard_error > 0 for found in many)
        errors = [np.mean([found[name].standard_error for found in each]) for each in (few, many)]
        assert errors[0] > errors[1]


def test_the_error_bar_is_the_spread_of_repeated_draws(make):
    """The mean jackknife error of 40 draws within a factor of two of their standard deviation."""
    found = [fed(make(), images(N, seed=seed, shift=0.1)).estimates() for seed in range(100, 140)]
    for name in found[0]:
        spread = np.std([estimates[name].value for estimates in found], ddof=1)
        assert 0.5 < np.mean([estimates[name].standard_error for estimates in found]) / spread < 2.0


def test_compute_gives_the_plain_values_also_without_blocks(make):
    estimates, computed = fed(make(), images(N, seed=1)).estimates(), fed(make(num_blocks=1), images(N, seed=1)).compute()
    computed = computed if isinstance(computed, dict) else {"": computed}
    assert computed.keys() == estimates.keys()
    for name, value in computed.items():
        assert value.dtype == torch.float64 and float(value) == pytest.approx(estimates[name].value, rel=1e-9)


def test_cuts_do_not_matter(make):
    assert fed(make(), images(N, seed=1), cuts=1).estimates() == fed(make(), images(N, seed=1), cuts=7).estimates()


@pytest.mark.parametrize("num_shards", [3, 8])
def test_state_merged_over_shards_is_that_of_the_whole(make, num_shards):
    features = images(N, seed=1, shift=0.3)
    blocks = np.arange(N) % K
    first, *rest = (make() for _ in range(num_shards))
    for metric, rows in zip([first, *rest], np.array_split(np.arange(N), num_shards), strict=True):
        metric.update(torch.from_numpy(features[rows]), torch.from_numpy(blocks[rows]))
    for metric in rest:
        first.merge_state(metric)
    whole = fed(make(), features).estimates()
    for name, estimate in first.estimates().items():
        assert estimate.value == pytest.approx(whole[name].value, rel=1e-9)
        assert estimate.standard_error == pytest.approx(whole[name].standard_error, rel=1e-6)


def test_images_go_through_the_extractor(make):
    pictures = np.random.default_rng(0).integers(0, 256, (N, 2, 2, 3), dtype=np.uint8)

    def extractor(batch: np.ndarray) -> np.ndarray:
        return batch.reshape(len(batch), -1).astype(np.float32) / 100

    through, direct = make(num_blocks=1, extractor=extractor), make(num_blocks=1)
    through.update(torch.from_numpy(pictures))
    direct.update(torch.from_numpy(extractor(pictures)))
    torch.testing.assert_close(through.compute(), direct.compute(), rtol=0.0, atol=0.0)


def test_reset_forgets(make):
    metric = fed(make(), images(N, seed=9, shift=3.0))
    metric.reset()
    assert fed(metric, images(N, seed=1)).estimates() == fed(make(), images(N, seed=1)).estimates()


def test_values_follow_what_is_added_merged_and_measured_against(make, reference):
    """Asking for values in between changes none: whatever a metric keeps from one time to the next is no longer used."""
    features = images(N, seed=1, shift=0.3)
    metric, other, whole = fed(make(), features[: 4 * K]), fed(make(), features[N // 2 :]), fed(make(), features)
    metric.estimates()
    fed(metric, features[4 * K : N // 2])
    metric.estimates()
    metric.merge_state(other)
    assert metric.estimates().keys() == whole.estimates().keys()
    for name, estimate in metric.estimates().items():
        assert estimate.value == pytest.approx(whole.estimates()[name].value, rel=1e-9)
    moved = images(300, seed=2, shift=1.0)
    against = ReferenceSet(Reference.of(GaussianStatistics.of(moved)), moved)
    fresh = fed(make(), features)
    metric.reference = fresh.reference = against
    for name, estimate in metric.estimates().items():
        assert estimate.value == pytest.approx(fresh.estimates()[name].value, rel=1e-9)


def test_worse_images_are_worse(make):
    near, far = (fed(make(), images(N, seed=1, shift=shift)).estimates() for shift in (0.0, 2.0))
    for name in near:
        if make().needs_reference and make().higher_is_better is not None:
            assert (far[name].value < near[name].value) == make().higher_is_better
        assert SAMPLES in make().measures
