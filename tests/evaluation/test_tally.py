import dataclasses
import io
import math

import numpy as np
import pytest
from PIL import Image

from evaluation.frechet import Reference, frechet_distance
from evaluation.metrics import plan_metrics
from evaluation.set_metric import HOLDOUT, RECONSTRUCTIONS, SAMPLES, ReferenceSet
from evaluation.set_tally import SetTally
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


def test_a_side_by_side_picture_has_every_reconstruction_to_the_right():
    tally = holdout_tally(10, num_blocks=2)
    images, codes, nll = holdout_item(np.random.default_rng(0), 10)
    pairs = {p: np.stack([np.full((64, 64, 3), 40, np.uint8), np.full((64, 64, 3), 200, np.uint8)]) for p in range(4)}
    tally.add((0, 10), dataclasses.replace(images, tiles=pairs), codes, nll)
    with Image.open(io.BytesIO(tally.side_by_side())) as picture:
        pixels = np.asarray(picture)
    assert (pixels[32, 32] == 40).all() and (pixels[32, 96] == 200).all()
