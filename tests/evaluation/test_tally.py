import dataclasses
import io
import math

import numpy as np
import pytest
from PIL import Image

from evaluation.estimates import fair_choice
from evaluation.frechet import Reference, frechet_distance
from evaluation.grids import grid_positions
from evaluation.metrics import plan_metrics
from evaluation.reference import StoredReference
from evaluation.set_metric import HOLDOUT, RECONSTRUCTIONS, SAMPLES, ReferenceSet
from evaluation.set_tally import SetTally
from evaluation.sheets import make_sheet
from evaluation.statistics import GaussianStatistics
from evaluation.tally import HoldoutTally, RealImages, SampleTally
from stages.errors import TesseraError
from stages.options import EvaluationOptions

NUM_CODES, CODEBOOK, WIDTH = 4, 16, 3
PLAN = plan_metrics(EvaluationOptions(metrics=("fd", "kd", "psnr", "codebook", "likelihood")))
(KEY,) = PLAN.features()


def set_tally(image_set: str, num_images: int, num_blocks: int, pairwise_limit: int = 1000) -> SetTally:
    return SetTally(image_set, PLAN, {KEY: WIDTH}, num_images, num_blocks, pairwise_limit)


def holdout_tally(num_images: int, num_blocks: int) -> HoldoutTally:
    sets = (set_tally(name, num_images, num_blocks) for name in (HOLDOUT, RECONSTRUCTIONS))
    return HoldoutTally(np.full(num_images, -1), *sets, PLAN, CODEBOOK, num_grid_images=4)


def random_features(generator: np.random.Generator, n: int) -> np.ndarray:
    return generator.normal(size=(n, WIDTH)).astype(np.float32)


@pytest.fixture
def reference() -> ReferenceSet:
    features = random_features(np.random.default_rng(9), 60)
    return ReferenceSet(Reference.of(GaussianStatistics.of(features)), features)


def holdout_item(
    generator: np.random.Generator, n: int, tiles: tuple[int, ...] = (), bad: tuple[int, ...] = ()
):
    is_usable = ~np.isin(np.arange(n), bad)
    m = int(is_usable.sum())
    images = RealImages(
        is_usable=is_usable,
        features={KEY: random_features(generator, m)},
        reconstruction_features={KEY: random_features(generator, m)},
        pixels={"psnr": generator.uniform(20, 30, size=m)},
        tiles={p: np.full((2, 8, 8, 3), p, np.uint8) for p in tiles if p not in bad},
    )
    return images, generator.integers(0, 8, size=(m, NUM_CODES)), generator.uniform(5, 9, size=m)


def test_holdout_metrics_are_those_of_all_images_together(reference):
    generator = np.random.default_rng(0)
    tally = holdout_tally(40, num_blocks=4)
    items = [((0, 16), holdout_item(generator, 16, tiles=(0, 1, 2, 3))), ((16, 40), holdout_item(generator, 24))]
    for item, parts in items:
        assert tally.tiles_in(item) == sorted(parts[0].tiles)
        tally.add(item, *parts)
    nll = np.concatenate([parts[2] for _, parts in items])
    codes = np.concatenate([parts[1] for _, parts in items])
    estimates = tally.estimates(NUM_CODES)
    assert estimates["validation_nll"].value == pytest.approx(nll.mean() / NUM_CODES)
    assert estimates["validation_bits_per_image"].value == pytest.approx(nll.mean() / math.log(2))
    assert estimates["validation_nll"].standard_error == pytest.approx(nll.std(ddof=1) / math.sqrt(40) / NUM_CODES)
    assert estimates["codebook_usage"].value == len(np.unique(codes)) / CODEBOOK
    p = np.bincount(codes.ravel()) / codes.size
    assert estimates["codebook_perplexity"].value == pytest.approx(math.exp(-np.sum(p[p > 0] * np.log(p[p > 0]))))
    assert estimates["codebook_perplexity"].standard_error > 0
    features = np.concatenate([parts[0].features[KEY] for _, parts in items])
    distances = tally.real.estimates({KEY: reference}) | tally.reconstructed.estimates({KEY: reference})
    assert set(distances) == {"fd_holdout", "rfd", "kd_holdout", "rkd"}
    expected = frechet_distance(GaussianStatistics.of(features), reference.gaussian)
    assert distances["fd_holdout"].value == pytest.approx(expected, rel=1e-9)
    assert set(tally.grids()) == {"real", "reconstructions"}


def test_unusable_images_are_left_out_and_counted(reference):
    generator = np.random.default_rng(0)
    tally = holdout_tally(10, num_blocks=2)
    tally.add((0, 10), *holdout_item(generator, 10, tiles=(0, 1, 2, 3), bad=(1, 7)))
    assert tally.num_unusable == 2
    assert tally.real.estimates({KEY: reference})["fd_holdout"].num_samples == 8
    assert tally.estimates(NUM_CODES)["psnr"].num_samples == 8
    tally.check(minimum=8)
    with pytest.raises(TesseraError, match="8 of 10 held-out images can be used, but the error bars need 9"):
        tally.check(minimum=9)


def test_samples_do_not_depend_on_the_cut_into_items(reference):
    features = random_features(np.random.default_rng(0), 100)
    results = []
    for size in (32, 100):
        tally = SampleTally(np.arange(100) % 10, set_tally(SAMPLES, 100, num_blocks=5), num_grid_images=20)
        for start in range(0, 100, size):
            item = (start, min(start + size, 100))
            tiles = {p: np.full((8, 8, 3), start + p, np.uint8) for p in tally.tiles_in(item)}
            tally.add(item, {KEY: features[slice(*item)]}, tiles)
        results.append((tally.grids()["samples"], tally.metrics.estimates({KEY: reference})))
    assert results[0] == results[1] and set(results[0][1]) == {"gfd", "gkd"}


def test_metrics_that_compare_images_one_by_one_see_a_fair_choice_of_them(reference):
    tally = set_tally(SAMPLES, 100, num_blocks=5, pairwise_limit=30)
    features = random_features(np.random.default_rng(0), 100)
    for rows in np.split(np.arange(100), 4):
        tally.add(rows, {KEY: features[rows]})
    found = tally.estimates({KEY: reference})
    assert (found["gfd"].num_samples, found["gkd"].num_samples) == (100, 30)


MEMORISATION = plan_metrics(EvaluationOptions(metrics=("memorisation", "codebook")))


def memorisation_tally(image_set: str, num_images: int, pairwise_limit: int) -> SetTally:
    return SetTally(image_set, MEMORISATION, {KEY: WIDTH}, num_images, 2, pairwise_limit)


NUM_CLASSES, NUM_SHOWN = 3, 12
UNLABELLED, LABELLED = np.full(30, -1), np.arange(30) % NUM_CLASSES


def tally_with_neighbours(reference: ReferenceSet, labels: np.ndarray, limit: int):
    """Tally of samples that are nearly the features 0, 2, 4 … of the reference, and which listed images are nearest."""
    n = len(labels)
    tally = SampleTally(labels, memorisation_tally(SAMPLES, n, limit), num_grid_images=NUM_SHOWN)
    for item in ((0, 16), (16, n)):
        tiles = {p: np.full((64, 64, 3), item[0] + p, np.uint8) for p in tally.tiles_in(item)}
        tally.add(item, {KEY: reference.features[::2][slice(*item)] + np.float32(1e-3)}, tiles)
    kept = np.arange(100, 160)
    return tally, tally.nearest_training({KEY: StoredReference(reference, key="", sha256="", kept=kept)})


def pixels_of(png: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(png)) as picture:
        return np.asarray(picture)


@pytest.mark.parametrize("limit, labels", [(100, UNLABELLED), (12, UNLABELLED), (12, LABELLED)])
def test_samples_that_are_compared_one_by_one_stand_beside_their_nearest_training_images(reference, limit, labels):
    tally, nearest = tally_with_neighbours(reference, labels, limit)
    assert set(tally.grids()) == set(tally.layouts()) == {"samples"}
    shown = [p for p in grid_positions(labels, NUM_SHOWN)[0] if fair_choice(30, limit)[p]]
    assert nearest == {p: 100 + 2 * p for p in shown} and 2 < len(shown) <= NUM_SHOWN
    tally.add_neighbours({p: None if p == shown[-1] else np.full((64, 64, 3), 200, np.uint8) for p in shown})
    pixels, layout = pixels_of(tally.grids()["neighbours"]), tally.layouts()["neighbours"]
    columns = layout["num_columns"] // 2
    assert pixels.shape[1] == columns * 130 - 2 and layout["labels"] == labels[shown].repeat(2).tolist()
    for i, p in enumerate(shown):
        y, x = i // columns * 66 + 32, i % columns * 130
        assert (pixels[y, x + 32] == p).all()
        assert (pixels[y, x + 96] == (255 if p == shown[-1] else 200)).all()


def test_a_sheet_of_neighbours_can_be_cut_to_a_class(reference):
    tally, nearest = tally_with_neighbours(reference, LABELLED, limit=100)
    tally.add_neighbours({p: np.full((64, 64, 3), 200 + LABELLED[p], np.uint8) for p in nearest})
    png = tally.grids()["neighbours"]
    height, width, _ = pixels_of(png).shape
    boxes = make_sheet(png, tally.layouts()["neighbours"]).boxes
    assert set(boxes) == set(range(NUM_CLASSES))
    for label, box in boxes.items():
        left, top, w, h = (round(share * size) for share, size in zip(box, (width, height, width, height)))
        cut = pixels_of(png)[top : top + h, left : left + w]
        pairs = [p for p in nearest if LABELLED[p] == label]
        assert cut.shape == (64, 130 * len(pairs) - 2, 3)
        assert [cut[32, 130 * i + 32, 0] for i in range(len(pairs))] == pairs
        assert all((cut[:, 130 * i + 64 : 130 * i + 128] == 200 + label).all() for i in range(len(pairs)))


def test_without_memorisation_no_sample_has_a_nearest_training_image(reference):
    tally = SampleTally(np.full(10, -1), set_tally(SAMPLES, 10, num_blocks=2), num_grid_images=4)
    assert tally.nearest_training({KEY: StoredReference(reference, key="", sha256="", kept=np.arange(60))}) == {}


def test_codes_of_the_images_that_are_compared_one_by_one_are_kept():
    generator = np.random.default_rng(0)
    codes = generator.integers(0, CODEBOOK, (40, NUM_CODES))
    samples = SampleTally(np.full(40, -1), memorisation_tally(SAMPLES, 40, 15), num_grid_images=1)
    holdout = HoldoutTally(
        np.full(40, -1),
        memorisation_tally(HOLDOUT, 40, 15),
        memorisation_tally(RECONSTRUCTIONS, 40, 15),
        MEMORISATION,
        CODEBOOK,
        num_grid_images=1,
    )
    bad = np.array([16, 30])
    for start in (0, 16, 32):
        item = (start, min(start + 16, 40))
        rows = np.arange(*item)
        samples.add(item, {KEY: random_features(generator, len(rows))}, {}, codes[rows])
        images, *_ = holdout_item(generator, len(rows), bad=tuple(bad - start))
        holdout.add(item, dataclasses.replace(images, pixels={}), codes[np.setdiff1d(rows, bad)])
    chosen = fair_choice(40, 15)
    np.testing.assert_array_equal(samples.metrics.codes(), codes[chosen])
    chosen[bad] = False
    np.testing.assert_array_equal(holdout.real.codes(), codes[chosen])


def test_a_side_by_side_picture_has_every_reconstruction_to_the_right():
    tally = holdout_tally(10, num_blocks=2)
    images, codes, nll = holdout_item(np.random.default_rng(0), 10)
    pairs = {p: np.stack([np.full((64, 64, 3), 40, np.uint8), np.full((64, 64, 3), 200, np.uint8)]) for p in range(4)}
    tally.add((0, 10), dataclasses.replace(images, tiles=pairs), codes, nll)
    with Image.open(io.BytesIO(tally.side_by_side())) as picture:
        pixels = np.asarray(picture)
    assert (pixels[32, 32] == 40).all() and (pixels[32, 96] == 200).all()
