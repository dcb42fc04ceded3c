import math

import numpy as np
import pytest

from evaluation.statistics import GaussianStatistics, merge_all
from evaluation.tally import HoldoutTally, RealImages, SampleTally
from stages.errors import TesseraError

NUM_CODES, CODEBOOK = 4, 16


def holdout_item(
    generator: np.random.Generator, n: int, d: int = 3, tiles: tuple[int, ...] = (), bad: tuple[int, ...] = ()
):
    is_usable = ~np.isin(np.arange(n), bad)
    m = int(is_usable.sum())
    images = RealImages(
        is_usable=is_usable,
        features=generator.normal(size=(m, d)).astype(np.float32),
        reconstruction_features=generator.normal(size=(m, d)).astype(np.float32),
        psnr=generator.uniform(20, 30, size=m),
        tiles={p: np.full((2, 8, 8, 3), p, np.uint8) for p in tiles if p not in bad},
    )
    return images, generator.integers(0, 8, size=(m, NUM_CODES)), generator.uniform(5, 9, size=m)


def test_holdout_metrics_are_those_of_all_images_together():
    generator = np.random.default_rng(0)
    tally = HoldoutTally(np.full(40, -1), 3, CODEBOOK, num_blocks=4, num_grid_images=4)
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
    features = np.concatenate([parts[0].features for _, parts in items])
    np.testing.assert_allclose(merge_all(tally.real.result()).covariance, GaussianStatistics.of(features).covariance)
    assert set(tally.grids()) == {"real", "reconstructions"}


def test_unusable_images_are_left_out_and_counted():
    generator = np.random.default_rng(0)
    tally = HoldoutTally(np.full(10, -1), 3, CODEBOOK, num_blocks=2, num_grid_images=4)
    tally.add((0, 10), *holdout_item(generator, 10, tiles=(0, 1, 2, 3), bad=(1, 7)))
    assert tally.num_unusable == 2
    assert merge_all(tally.real.result()).n == 8
    assert tally.estimates(NUM_CODES)["psnr"].num_samples == 8
    tally.check(minimum=8)
    with pytest.raises(TesseraError, match="8 of 10 held-out images can be used, but the error bars need 9"):
        tally.check(minimum=9)


def test_samples_do_not_depend_on_the_cut_into_items():
    features = np.random.default_rng(0).normal(size=(100, 3)).astype(np.float32)
    results = []
    for size in (32, 100):
        tally = SampleTally(np.arange(100) % 10, 3, num_blocks=5, num_grid_images=20)
        for start in range(0, 100, size):
            item = (start, min(start + size, 100))
            tiles = {p: np.full((8, 8, 3), start + p, np.uint8) for p in tally.tiles_in(item)}
            tally.add(item, features[slice(*item)], tiles)
        results.append((tally.grids()["samples"], [block.m2.tobytes() for block in tally.features.result()]))
    assert results[0] == results[1]
