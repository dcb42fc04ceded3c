"""Thresholds that keep false flags as rare as they are with one earlier record."""

import numpy as np
import pytest
import scipy.stats

from evaluation.significance import student_tail, threshold_among


@pytest.mark.parametrize("degrees_of_freedom", [1, 2, 9, 18, 38, 198])
@pytest.mark.parametrize("t", [0.0, 0.5, 3.0, 10.0, 50.0])
def test_the_tail_is_students(t, degrees_of_freedom):
    assert student_tail(t, degrees_of_freedom) == pytest.approx(scipy.stats.t.sf(t, degrees_of_freedom), rel=1e-9)


@pytest.mark.parametrize("threshold", [0.5, 3.0, 8.3, 10.0, 20.0, 50.0])
def test_one_earlier_value_leaves_the_threshold_and_more_raise_it(threshold):
    found = [threshold_among(n, threshold, 18) for n in (1, 2, 10, 100, 1000)]
    assert found[0] == threshold and found == sorted(set(found)) and found[-1] < 3 * threshold + 3
    for n, limit in zip((2, 10, 100, 1000), found[1:]):
        assert scipy.stats.t.sf(limit, 18) * n == pytest.approx(scipy.stats.t.sf(threshold, 18), rel=1e-6)


@pytest.mark.parametrize("num_earlier", [10, 100])
def test_false_flags_do_not_grow_with_the_history(num_earlier):
    """No change at all, and error bars from ten blocks each: as rare with many earlier records as with one."""
    num_blocks, num_histories = 10, 10_000
    blocks = np.random.default_rng(0).normal(size=(num_histories, num_earlier + 1, num_blocks))
    values, variances = blocks.mean(-1), blocks.var(-1, ddof=1) / num_blocks
    worse_by = (values[:, :1] - values[:, 1:]) / np.sqrt(variances[:, :1] + variances[:, 1:])

    def rate(num):
        # As `regressions_of`: worse than the best of them by the threshold, which the rarest of all comparisons decides.
        return (worse_by[:, :num] > threshold_among(num, 3.0, 2 * (num_blocks - 1))).any(1).mean()

    assert (worse_by > 3.0).any(1).mean() > 3 * rate(1)
    assert rate(num_earlier) < 1.5 * scipy.stats.t.sf(3.0, 2 * (num_blocks - 1))
