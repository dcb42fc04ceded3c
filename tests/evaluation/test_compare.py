"""Records of different protocols are refused with both sides named; what got worse is judged by its error bars."""

import json

import pytest
from report_support import NAME, metric, record

from evaluation.compare import compare, direction, find_regressions, group_series, to_judge
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


def test_metrics_of_different_numbers_of_images_are_left_out_and_named(caplog):
    before, after = record(100, 90.0), record(200, 80.0)
    after.metrics["psnr"] = metric(20.0, 0.1, 10)
    before.metrics["psnr"] = metric(21.0, 0.1, 11)
    assert "psnr" not in {found.metric for found in compare(before, after)}
    assert f"psnr of {after.path} is not compared" in caplog.text
    caplog.clear()
    find_regressions([before, after], 3.0)
    assert f"psnr of {after.path} is not compared" in caplog.text


def measured(body, **ways):
    """A record that says for each metric how it was measured, and by which extractors and references in all."""
    body.content["protocols"] = ways
    body.content["identity"] |= {
        "extractor_fingerprints": sorted({way["extractor"] for way in ways.values()}),
        "reference_keys": sorted(map(repr, ways.values())),
    }
    return body


FD = {"extractor": "a", "fingerprint": "a1", "reference": "r"}


def test_a_metric_that_one_of_them_has_does_not_matter():
    before = measured(record(100, 90.0), gfd=FD)
    after = measured(record(200, 120.0), gfd=FD, gkd={**FD, "num_pairwise_images": 10}, gfid={**FD, "extractor": "b"})
    after.metrics["gkd"] = metric(0.1, 0.01)
    assert {found.metric for found in compare(before, after)} == before.metrics.keys()
    (series,) = group_series([before, after])
    assert [found.difference.metric for found in find_regressions(series, 3.0)] == ["gfd"]


def test_a_metric_that_both_have_must_be_measured_alike(caplog):
    before = measured(record(100, 90.0), gfd=FD, gkd={**FD, "num_pairwise_images": 10})
    after = measured(record(200, 120.0), gfd=FD, gkd={**FD, "num_pairwise_images": 20})
    for each in (before, after):
        each.metrics["gkd"] = metric(0.1 * each.step, 0.01)
    with pytest.raises(ArtefactError, match="gkd is .*'num_pairwise_images': 10.* there and .*'num_pairwise_images': 20.* here"):
        compare(before, after)
    (series,) = group_series([before, after])
    assert [found.difference.metric for found in find_regressions(series, 3.0)] == ["gfd"]
    assert "gkd of" in caplog.text


def test_means_over_the_same_images_are_compared_block_by_block():
    """What is hard for one model is hard for the other: the blocks differ by far more than the models do."""
    before, after = record(100, 90.0), record(200, 90.0)
    blocks = [4.8, 5.3, 4.9, 5.1, 5.2, 4.7, 5.0, 5.1, 4.9, 5.0]
    worse = [block + 0.05 + 0.01 * (i % 2) for i, block in enumerate(blocks)]
    for each, means in ((before, blocks), (after, worse)):
        each.metrics["validation_nll"] = metric(sum(means) / 10, 0.06, block_means=means)
    (difference,) = [found for found in compare(before, after) if found.metric == "validation_nll"]
    assert difference.standard_error == pytest.approx(0.01 / 2 / 3) and difference.degrees_of_freedom == 9
    assert [found.difference.metric for found in find_regressions([before, after], 3.0)] == ["validation_nll"]
    after.metrics["validation_nll"]["block_means"] = [*reversed(worse)]  # other blocks: as if the images were others
    assert find_regressions([before, after], 3.0) == []


def test_what_only_rounding_changes_is_no_regression():
    before, after = record(100, 90.0), record(200, 90.0)
    for each, value in ((before, 30.0), (after, 30.0 - 1e-9)):
        each.metrics["psnr"] = metric(value, 0.1, block_means=[value + 1e-12 * i for i in range(10)])
    assert find_regressions([before, after], 3.0) == []


WAYS = {
    1: ("gfd", "rfid", "fd_holdout", "gkd_dinov2_vitb14", "fd_dinov2_holdout", "gsfid", "validation_nll"),
    -1: ("psnr", "precision", "recall_reconstructions", "ssim", "inception_score"),
    0: ("codebook_usage", "codebook_perplexity", "nearest_training_codes", "copied_code_share", "no_such_metric"),
}


@pytest.mark.parametrize("name, sign", [(name, sign) for sign, names in WAYS.items() for name in names])
def test_which_way_is_worse(name, sign):
    assert direction(name) == sign


@pytest.mark.parametrize(
    "gfds, flagged", [((90, 80, 98), True), ((90, 80, 95), False), ((90, 80, 60), False), ((90,), False)]
)
def test_a_regression_is_worse_than_the_best_by_its_error_bars(gfds, flagged):
    records = [record(100 * (i + 1), float(gfd)) for i, gfd in enumerate(gfds)]
    found = find_regressions(records, threshold=3.0)
    assert [r.difference.metric for r in found] == (["gfd"] if flagged else [])
    if flagged:
        assert (found[0].best.step, found[0].record.step) == (200, 300)
        assert found[0].difference.worse_by == pytest.approx(18 / (3.3 * 2**0.5))


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
