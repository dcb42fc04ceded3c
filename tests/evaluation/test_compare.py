"""Records of different protocols are refused with both sides named; what got worse is judged by its error bars."""

import json

import numpy as np
import pytest
from report_support import NAME, metric, record

from evaluation.compare import compare, direction, find_regressions, group_series, threshold_among, to_judge
from stages.errors import ArtefactError


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"num_samples": 64}, ["num_samples is 512 there and 64 here"]),
        ({"distance": "Fréchet distance (other)"}, ["extractor_fingerprint is", NAME, "Fréchet distance (other)"]),
        ({"extractor_resize": "bicubic"}, ["extractor_resize is bilinear there and bicubic here"]),
    ],
)
def test_records_measured_otherwise_are_refused_and_both_are_named(changes, words):
    before, after = record(100, 90.0), record(200, 80.0, **changes)
    with pytest.raises(ArtefactError) as caught:
        compare(before, after)
    assert all(word in str(caught.value) for word in [before.path, after.path, *words])


def test_another_reference_is_refused():
    before, after = record(100, 90.0), record(200, 80.0)
    after.content["identity"]["reference_key"] = "other"
    with pytest.raises(ArtefactError, match="reference_key is reference there and other here"):
        compare(before, after)


def test_another_checkpoint_sampling_and_seed_may_be_compared():
    before, after = record(100, 90.0), record(200, 80.0, seed=3, sampling={"cfg_scale": 9.0})
    (difference,) = [found for found in compare(before, after) if found.metric == "gfd"]
    assert (difference.before, difference.after) == (90.0, 80.0)
    assert difference.standard_error == pytest.approx(3.3 * 2**0.5)
    assert difference.worse_by == pytest.approx(-10 / (3.3 * 2**0.5))


def test_metrics_of_different_numbers_of_images_are_left_out():
    before, after = record(100, 90.0), record(200, 80.0)
    after.metrics["psnr"] = metric(20.0, 0.1, 10)
    before.metrics["psnr"] = metric(21.0, 0.1, 11)
    assert "psnr" not in {found.metric for found in compare(before, after)}


WAYS = {
    1: ("gfd", "rfid", "fd_holdout", "gkd_dinov2_vitb14", "fd_dinov2_holdout", "gsfid", "validation_nll"),
    -1: ("psnr", "precision", "recall_reconstructions", "ssim", "inception_score"),
    0: ("codebook_usage", "codebook_perplexity", "nearest_training_codes", "copied_code_share", "no_such_metric"),
}


@pytest.mark.parametrize("name, sign", [(name, sign) for sign, names in WAYS.items() for name in names])
def test_which_way_is_worse(name, sign):
    assert direction(name) == sign


@pytest.mark.parametrize(
    "gfds, flagged", [((90, 80, 95), True), ((90, 80, 93), False), ((90, 80, 60), False), ((90,), False)]
)
def test_a_regression_is_worse_than_the_best_by_its_error_bars(gfds, flagged):
    records = [record(100 * (i + 1), float(gfd)) for i, gfd in enumerate(gfds)]
    found = find_regressions(records, threshold=3.0)
    assert [r.difference.metric for r in found] == (["gfd"] if flagged else [])
    if flagged:
        assert (found[0].best.step, found[0].record.step) == (200, 300)
        assert found[0].difference.worse_by == pytest.approx(15 / (3.3 * 2**0.5))


@pytest.mark.parametrize("recall, flagged", [(0.0, True), (1.0, False), (1.0 - 1e-12, False)])
def test_a_change_between_values_without_any_error_is_certain(recall, flagged):
    """Shares are 0 or 1 in every block where samples collapsed."""
    before, after = record(100, 90.0), record(200, 90.0)
    before.metrics["recall"], after.metrics["recall"] = metric(1.0, 0.0), metric(recall, 0.0)
    found = find_regressions([before, after], threshold=3.0)
    assert [r.difference.metric for r in found] == (["recall"] if flagged else [])
    assert all(json.loads(json.dumps(r.to_dict(), allow_nan=False))["worse_by"] > 1000 for r in found)


def test_old_steps_that_are_measured_late_are_not_judged_and_those_of_a_killed_night_are():
    first, late, newest = record(300, 90.0, night=1), record(200, 500.0, night=2), record(500, 90.0, night=4)
    killed = record(400, 500.0, night=3)
    (series,) = group_series([first, late, killed, newest])
    assert [r.step for r in to_judge(series, {first.id})] == [400, 500]
    assert [r.step for r in to_judge(series, {first.id, killed.id, newest.id})] == [500]
    assert [r.step for r in to_judge(series)] == [500]


def test_after_a_training_went_back_its_newest_record_is_judged_by_earlier_steps():
    before = [record(50_000, 80.0, night=1), record(60_000, 79.0, night=2)]
    (series,) = group_series([*before, record(55_000, 500.0, night=3)])
    (found,) = find_regressions(series, threshold=3.0)
    assert (found.record.step, found.best.step) == (55_000, 50_000)
    (series,) = group_series([*before, record(50_000, 78.0, night=3), record(60_000, 500.0, night=4)])
    assert [regression.record.created_at for regression in find_regressions(series, 3.0)] == [series[-1].created_at]


def test_false_flags_do_not_grow_with_the_history():
    """No change at all, noise of the size of the error bars: as many flags with 100 earlier records as with one."""
    assert threshold_among(1, 3.0) == pytest.approx(3.0)
    values = np.random.default_rng(0).normal(size=(20_000, 101))
    worse_by = (values[:, 0] - values[:, 1:].min(1)) / 2**0.5
    assert (worse_by > 3.0).mean() > 0.04 and (worse_by > threshold_among(100, 3.0)).mean() < 0.0013


def test_a_value_without_error_bar_is_no_regression():
    records = [record(100, 80.0), record(200, 80.0)]
    records[1].metrics["codebook_usage"]["value"] = 0.1
    assert find_regressions(records, 3.0) == []


def test_series_are_apart_by_run_sampling_and_protocol_and_in_order_of_step():
    records = [
        record(300, 1.0, night=1),
        record(100, 1.0, night=2),
        record(100, 1.0, night=3, run="/runs/b"),
        record(100, 1.0, night=4, sampling={"cfg_scale": 9.0}),
        record(100, 1.0, night=5, num_samples=64),
        record(200, 1.0, night=6),
    ]
    assert [[r.step for r in series] for series in group_series(records)] == [[100], [100], [100], [100, 200, 300]]
