import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist

from evaluation.estimates import jackknife
from evaluation.frechet import Reference
from evaluation.neighbour_metrics import (
    DensityCoverage,
    NearestTraining,
    PrecisionRecall,
    copied_share,
    distances,
    share_beyond,
)
from evaluation.set_metric import ReferenceSet
from evaluation.statistics import GaussianStatistics

N, M, K = 120, 90, 4


def features(n: int, seed: int, scale: float = 1.0) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=(n, 5)) * scale).astype(np.float32)


def metric_of(cls, x: np.ndarray, y: np.ndarray, num_blocks: int = 1):
    metric = cls(x.shape[1], num_blocks, reference=ReferenceSet(Reference.of(GaussianStatistics.of(y)), y))
    metric.update(torch.from_numpy(x), torch.arange(len(x)) % num_blocks)
    return metric


def kth(x: np.ndarray, k: int) -> np.ndarray:
    return np.sort(cdist(x, x), axis=1)[:, k]


def textbook(x: np.ndarray, y: np.ndarray) -> dict[str, float]:
    """The four definitions, read off the papers."""
    d = cdist(x, y)
    return {
        "precision": float((d <= kth(y, 3)).any(1).mean()),
        "recall": float((d <= kth(x, 3)[:, None]).any(0).mean()),
        "density": float((d <= kth(y, 5)).sum(1).mean() / 5),
        "coverage": float((d <= kth(y, 5)).any(0).mean()),
    }


@pytest.mark.parametrize("scale", [0.6, 1.0, 1.5])
def test_equal_the_definitions(monkeypatch, scale):
    monkeypatch.setattr("evaluation.neighbour_metrics.CHUNK_ROWS", 50)
    x, y = features(N, 1, scale), features(M, 2)
    found = metric_of(PrecisionRecall, x, y).compute() | metric_of(DensityCoverage, x, y).compute()
    assert {name: float(value) for name, value in found.items()} == pytest.approx(textbook(x, y), abs=1e-12)


def test_error_bars_are_those_of_leaving_out_blocks():
    x, y = features(N, 1, 0.8), features(M, 2)
    estimates = metric_of(PrecisionRecall, x, y, K).estimates() | metric_of(DensityCoverage, x, y, K).estimates()
    without = {
        blocks: textbook(np.delete(x, np.flatnonzero(np.isin(np.arange(N) % K, blocks)), axis=0), y)
        for blocks in ((0,), (1,), (2,), (3,), (0, 1), (2, 3))
    }
    whole = textbook(x, y)
    for name in ("recall", "coverage"):
        singles, pairs = ([found[name] for blocks, found in without.items() if len(blocks) == n] for n in (1, 2))
        pairs = pairs if name == "recall" else []
        assert estimates[name].standard_error == pytest.approx(jackknife(whole[name], singles, N, pairs).standard_error)
        assert estimates[name].bias_corrected is None


def test_the_error_bar_of_recall_is_that_of_repeated_draws():
    """40 draws of 300 images; leaving out single blocks only gives 1.5 times their standard deviation."""
    y = features(300, 2)
    found = [metric_of(PrecisionRecall, features(300, seed), y, 10).estimates()["recall"] for seed in range(100, 140)]
    values, errors = np.array([(each.value, each.standard_error) for each in found]).T
    assert 0.75 < errors.mean() / values.std(ddof=1) < 1.25


def test_few_modes_are_precise_but_not_covering():
    y = features(M, 2)
    found = metric_of(PrecisionRecall, y[:6].repeat(10, axis=0) + features(60, 1, 0.01), y).compute()
    assert found["precision"] > 0.95 and found["recall"] < 0.3


def test_nearest_images_are_found_once(monkeypatch):
    calls = []

    def counted(*args):
        calls.append(args)
        return distances(*args)

    monkeypatch.setattr("evaluation.neighbour_metrics.distances", counted)
    samples, holdout = (metric_of(NearestTraining, features(50, seed), features(M, 2)) for seed in (3, 4))
    samples.estimates(), holdout.estimates(), copied_share(samples, holdout), samples.nearest()
    assert len(calls) == 2


def test_copies_of_training_images_show_and_fresh_images_do_not():
    training = features(M, 2)
    holdout = metric_of(NearestTraining, features(400, 3), training)
    fresh = metric_of(NearestTraining, features(400, 4), training)
    copies = metric_of(NearestTraining, np.concatenate([features(300, 5), training + 1e-3]), training)
    assert copied_share(fresh, holdout).value < 0.04
    share = copied_share(copies, holdout)
    assert share.value == pytest.approx(M / (300 + M), abs=0.04) and share.standard_error > 0
    nearest, which = copies.nearest()
    assert which[300:].tolist() == list(range(M))
    np.testing.assert_allclose(nearest[300:], np.sqrt(5) * 1e-3, rtol=0.05)


@pytest.mark.parametrize("num_ordinary, expected", [(99, 0.01), (512, 0.01), (50, 1 / 51), (20, 1 / 21)])
def test_of_ordinary_values_about_one_in_a_hundred_is_beyond(num_ordinary, expected):
    """Means over 2,000 draws of both sets, whose error bar counts the noise of the limit."""
    generator = np.random.default_rng(num_ordinary)
    found = [share_beyond(generator.normal(size=200), generator.normal(size=num_ordinary)) for _ in range(2000)]
    shares = np.array([each.value for each in found])
    assert shares.mean() == pytest.approx(expected, rel=0.1)
    if num_ordinary == 512:
        assert np.mean([each.standard_error for each in found]) == pytest.approx(shares.std(), rel=0.3)
