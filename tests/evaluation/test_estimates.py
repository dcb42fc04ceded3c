import numpy as np
import pytest

from evaluation.estimates import (
    Estimate,
    assign_blocks,
    fair_choice,
    jackknife,
    leave_one_out,
    mean_estimate,
    perplexity,
    usage,
)


def test_jackknife_of_a_mean_is_its_textbook_standard_error():
    values = np.random.default_rng(0).normal(size=40)
    estimate = jackknife(values.mean(), [np.delete(values, i).mean() for i in range(40)], 40)
    assert estimate.standard_error == pytest.approx(values.std(ddof=1) / np.sqrt(40))
    assert estimate.bias_corrected == pytest.approx(values.mean())
    assert estimate.standard_error == pytest.approx(mean_estimate(values).standard_error)


def test_jackknife_removes_the_bias_of_the_plain_variance():
    values = np.random.default_rng(1).normal(size=30)
    estimate = jackknife(values.var(), [np.delete(values, i).var() for i in range(30)], 30)
    assert estimate.bias_corrected == pytest.approx(values.var(ddof=1))


def test_pairs_of_blocks_correct_the_error_of_a_squared_mean():
    """Its whole variance comes from pairs of images, of which the plain jackknife reports twice as much."""
    k, found = 20, []
    for seed in range(200):
        values = np.random.default_rng(seed).normal(size=(k, 50))

        def statistic(*left_out: int) -> float:
            return float(np.sum(np.delete(values, left_out, axis=0).mean(axis=0) ** 2))

        singles, pairs = [statistic(i) for i in range(k)], [statistic(i, i + 1) for i in range(0, k, 2)]
        plain, corrected = jackknife(statistic(), singles, k), jackknife(statistic(), singles, k, pairs)
        assert corrected.bias_corrected == plain.bias_corrected
        found.append((statistic(), plain.standard_error**2, corrected.standard_error**2))
    values, plain, corrected = np.array(found).T
    assert plain.mean() / values.var(ddof=1) > 1.6
    assert corrected.mean() / values.var(ddof=1) == pytest.approx(1.0, abs=0.3)


def test_a_fair_choice_is_fixed_spread_and_of_the_right_size():
    chosen = fair_choice(1000, 100)
    assert chosen.sum() == 100 and fair_choice(100, 100).all() and fair_choice(3, 100).all()
    np.testing.assert_array_equal(chosen, fair_choice(1000, 100))
    assert min(part.sum() for part in np.split(chosen, 10)) >= 3


def test_blocks_are_even_fixed_and_independent_of_labels_in_turn():
    blocks = assign_blocks(1003, 10)
    sizes = np.bincount(blocks, minlength=10)
    assert sizes.max() - sizes.min() <= 1
    np.testing.assert_array_equal(blocks, assign_blocks(1003, 10))
    labels = np.arange(1003) % 10
    for block in range(10):
        assert len(np.unique(labels[blocks == block])) == 10


def test_perplexity_and_usage_of_known_histograms():
    assert perplexity(np.array([5, 5, 5, 5, 0, 0])) == pytest.approx(4.0)
    assert perplexity(np.array([7, 0])) == pytest.approx(1.0)
    assert usage(np.array([5, 1, 0, 0])) == 0.5


def test_histogram_blocks_that_agree_have_no_error():
    estimate = leave_one_out(perplexity, np.tile([3, 1, 2], (5, 1)), 30)
    assert estimate.standard_error == pytest.approx(0.0, abs=1e-12)
    assert estimate.value == pytest.approx(perplexity(np.array([3, 1, 2])))


def test_a_record_names_the_corrected_value_only_where_there_is_one():
    assert Estimate(1.0, 5).to_dict() == {"value": 1.0, "standard_error": None, "num_samples": 5}
    assert Estimate(1.0, 5, 0.1, 0.9).to_dict()["bias_corrected"] == 0.9
