"""What every extractor in EXTRACTORS must keep. A new entry is tested by being registered."""

import numpy as np
import pytest
import torch

from evaluation.extractors import EXTRACTORS, Extractor, distance_name, open_extractor
from evaluation.frechet import Reference, frechet_distance
from evaluation.statistics import GaussianStatistics
from pipeline.sources import open_source
from pipeline.views import apply_view
from stages.errors import ConfigError
from stages.options import ImageOptions, SourceOptions

RESOLUTION = 64


@pytest.fixture(scope="module", params=sorted(EXTRACTORS))
def extractor(request) -> Extractor:
    torch.set_num_threads(1)
    return open_extractor(request.param, RESOLUTION)


@pytest.fixture(scope="module")
def scenes() -> np.ndarray:
    """uint8 (400, 32, 32, 3)."""
    options = ImageOptions(size=32)
    source = open_source(SourceOptions(num_images=400), options)
    uris = source.list_images("train")["uri"].to_pylist()
    return np.stack([apply_view(source.decode(source.fetch(uri)).image, "center", options) for uri in uris])


@pytest.mark.parametrize("channels", [1, 3])
def test_features_are_finite_float32_of_the_declared_width(extractor, channels):
    images = np.random.default_rng(0).integers(0, 256, (5, 40, 40, channels), dtype=np.uint8)
    features = extractor(images)
    assert features.shape == (5, extractor.num_features) and features.dtype == np.float32
    assert np.isfinite(features).all()
    assert extractor(images[:0]).shape == (0, extractor.num_features)


def test_grey_is_the_same_as_grey_in_three_channels(extractor):
    grey = np.random.default_rng(0).integers(0, 256, (3, 40, 40, 1), dtype=np.uint8)
    np.testing.assert_array_equal(extractor(grey), extractor(grey.repeat(3, axis=3)))


def test_features_do_not_depend_on_the_rest_of_the_batch(extractor):
    images = np.random.default_rng(0).integers(0, 256, (70, 40, 40, 3), dtype=np.uint8)
    whole = extractor(images)
    parts = np.concatenate([extractor(images[:3]), extractor(images[3:41]), extractor(images[41:])])
    np.testing.assert_allclose(parts, whole, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(extractor(images), whole)


def test_name_says_what_distances_mean(extractor):
    assert extractor.name.endswith(f"@{RESOLUTION}")
    assert extractor.resize and extractor.name in distance_name(extractor)
    assert distance_name(extractor).startswith("FID" if extractor.metric_prefix == "fid" else "Fréchet distance")


def test_fingerprint_is_stable_and_tells_resolutions_apart(extractor):
    name = extractor.name.partition("@")[0]
    assert open_extractor(name, RESOLUTION).fingerprint == extractor.fingerprint
    assert open_extractor(name, RESOLUTION + 32).fingerprint != extractor.fingerprint
    assert len(extractor.fingerprint) == 64


def test_sees_real_images_alike_and_damaged_ones_apart(extractor, scenes):
    """A split of real images is nearest, and more noise is further; random weights and raw pixels fail this."""
    reference = Reference.of(GaussianStatistics.of(extractor(scenes[:200])))
    generator = np.random.default_rng(0)
    real = scenes[200:]
    noise = generator.normal(size=real.shape)
    noisy = [np.clip(real + sigma * noise, 0, 255).astype(np.uint8) for sigma in (0, 10, 25, 60)]
    mosaics = [real[:, ::k, ::k].repeat(k, axis=1).repeat(k, axis=2) for k in (1, 2, 4, 8)]
    for ladder in (noisy, mosaics):
        distances = [frechet_distance(GaussianStatistics.of(extractor(images)), reference) for images in ladder]
        assert distances == sorted(distances) and distances[1] > 1.2 * distances[0]


def test_unknown_names_are_refused_with_what_is_allowed():
    for name in ("inception", "evaluation.extractors:Missing", "no_such_package.module:Class"):
        with pytest.raises(ConfigError, match=f"evaluation.extractor is {name}.*efficientnet-lite0"):
            open_extractor(name, RESOLUTION)
