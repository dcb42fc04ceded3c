import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluation.statistics import GaussianStatistics, merge, merge_all, subtract


def features(n: int, d: int = 16, seed: int = 0, offset: float = 3.0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return (generator.normal(size=(n, d)) @ generator.normal(size=(d, d)) + offset).astype(np.float32)


def assert_same(a: GaussianStatistics, b: GaussianStatistics, tolerance: float = 1e-12) -> None:
    assert a.n == b.n
    np.testing.assert_allclose(a.mean, b.mean, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(a.m2, b.m2, rtol=tolerance, atol=tolerance * max(1.0, np.abs(b.m2).max()))


def test_moments_are_those_of_numpy():
    values = features(100).astype(np.float64)
    statistics = GaussianStatistics.of(values)
    np.testing.assert_allclose(statistics.mean, values.mean(axis=0), rtol=1e-14)
    np.testing.assert_allclose(statistics.covariance, np.cov(values, rowvar=False), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("num_shards", [1, 3, 8])
def test_shards_give_the_statistics_of_the_whole(num_shards):
    values = features(501)
    whole = GaussianStatistics.of(values)
    assert_same(merge_all(GaussianStatistics.of(shard) for shard in np.array_split(values, num_shards)), whole)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=6), st.integers(0, 2**16))
def test_any_cut_merges_to_the_whole(sizes, seed):
    values = features(sum(sizes), d=5, seed=seed)
    parts = np.split(values, np.cumsum(sizes)[:-1])
    assert_same(merge_all(GaussianStatistics.of(part) for part in parts), GaussianStatistics.of(values), 1e-11)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 2**16))
def test_subtract_undoes_merge(n_kept, n_removed, seed):
    kept, removed = (GaussianStatistics.of(features(n, d=5, seed=seed + i)) for i, n in enumerate((n_kept, n_removed)))
    assert_same(subtract(merge(kept, removed), removed), kept, 1e-10)


def test_a_mean_far_above_the_spread_costs_no_precision():
    spread = np.random.default_rng(0).normal(size=(4000, 8))
    merged = merge_all(GaussianStatistics.of(part) for part in np.array_split(spread + 1e6, 13))
    np.testing.assert_allclose(merged.m2, GaussianStatistics.of(spread).m2, atol=1e-5)
