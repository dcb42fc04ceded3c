"""Which losses are undone."""

import math

import pytest

from cluster.spikes import MIN_STEPS_BEFORE, find_fault, find_not_finite

STEADY = [3.0 + 0.01 * (i % 5) for i in range(64)]


@pytest.mark.parametrize("loss, grad_norm", [(math.nan, 1.0), (math.inf, 1.0), (3.0, math.nan), (3.0, math.inf)])
def test_what_is_not_finite_is_a_fault_even_without_a_threshold(loss, grad_norm):
    assert find_fault(loss, grad_norm, [], threshold=0.0)


def test_a_loss_far_above_those_before_is_a_fault():
    assert find_fault(9.0, 1.0, STEADY, threshold=10.0)
    assert find_fault(3.1, 1.0, STEADY, threshold=10.0) is None
    assert find_fault(0.5, 1.0, STEADY, threshold=10.0) is None, "falling is what a loss should do"
    assert find_fault(9.0, 1.0, STEADY, threshold=0.0) is None


def test_a_falling_loss_is_no_spike():
    losses = [7.0 * 0.99**step for step in range(400)]
    assert all(find_fault(loss, 1.0, losses[:step], threshold=10.0) is None for step, loss in enumerate(losses))


def test_too_few_steps_say_nothing():
    assert find_fault(9.0, 1.0, STEADY[: MIN_STEPS_BEFORE - 1], threshold=10.0) is None


def test_only_recent_steps_count():
    assert find_fault(9.0, 1.0, [9.0] * 500 + STEADY, threshold=10.0)


def test_any_number_of_a_record_that_is_not_finite_is_found():
    record = {"step": 3, "digests": ["nan"], "loss": 0.5, "grad_norm": 1.0, "discriminator": 0.2}
    assert find_not_finite(record) is None
    for value in (math.nan, math.inf, -math.inf):
        assert find_not_finite({**record, "discriminator": value}) == f"discriminator {value}"
