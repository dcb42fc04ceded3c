import numpy as np
import pytest
import torch

from evaluation.inception_score import InceptionScore

V = 20


def score(logits: np.ndarray, num_blocks: int = 1):
    metric = InceptionScore(V, num_blocks)
    metric.update(torch.from_numpy(logits.astype(np.float32)), torch.arange(len(logits)) % num_blocks)
    return metric.estimates()[""]


def test_is_the_published_formula():
    logits = np.random.default_rng(0).normal(size=(200, V)) * 2
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    expected = np.exp(np.mean(np.sum(p * np.log(p / p.mean(0)), axis=1)))
    assert score(logits).value == pytest.approx(expected, rel=1e-6)


def test_bounds_and_saturated_logits():
    assert score(np.zeros((50, V))).value == pytest.approx(1.0)
    certain = np.where(np.eye(V) > 0, 1e4, -1e4).repeat(5, axis=0)
    assert score(certain).value == pytest.approx(V)


def test_correction_removes_the_loss_of_few_images():
    logits = np.random.default_rng(0).normal(size=(20_000, V)) * 2
    truth = score(logits).value
    draws = [score(logits[start : start + 200], num_blocks=10) for start in range(0, 20_000, 200)]
    plain, corrected = (np.mean([getattr(d, name) for d in draws]) - truth for name in ("value", "bias_corrected"))
    assert plain < 0 and abs(corrected) < 0.2 * abs(plain)
