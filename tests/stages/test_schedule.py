"""Schedules at the places that define them."""

import pytest

from stages.schedule import average_decay, warmup_constant, warmup_cosine, warmup_stable_decay


def test_all_rise_linearly():
    for schedule in (
        lambda x: warmup_constant(x, 10),
        lambda x: warmup_cosine(x, 10, 100, 0.1),
        lambda x: warmup_stable_decay(x, 10, 100, 20, 0.1),
    ):
        assert [schedule(x) for x in (0, 5, 10)] == pytest.approx([0, 0.5, 1.0])


def test_cosine_ends_at_its_floor():
    assert warmup_cosine(55, 10, 100, 0.1) == pytest.approx(0.55)
    assert warmup_cosine(100, 10, 100, 0.1) == warmup_cosine(500, 10, 100, 0.1) == pytest.approx(0.1)


def test_wsd_is_constant_until_it_falls_linearly():
    at = [warmup_stable_decay(x, 10, 100, 20, 0.1) for x in (10, 50, 80, 90, 100, 500)]
    assert at == pytest.approx([1.0, 1.0, 1.0, 0.55, 0.1, 0.1])


def test_a_short_run_does_not_exceed_its_warmup():
    assert warmup_stable_decay(5, 10, 12, 20, 0.0) == pytest.approx(7 / 20)


def test_an_average_follows_faster_at_first():
    assert [average_decay(0.999, n) for n in (1, 10, 100_000)] == pytest.approx([2 / 11, 11 / 20, 0.999])
    assert average_decay(0.0, 1) == 0.0, "follows at once"
