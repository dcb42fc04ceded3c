"""What every extractor in EXTRACTORS must keep. A new entry is tested by being registered."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from vit_support import PATCH, vit_shapes

from evaluation.extractors import (
    EXTRACTORS,
    FEATURES,
    LOGITS,
    SPATIAL,
    Extractor,
    InceptionV3,
    distance_name,
    extractor_class,
    open_extractor,
    output_width,
)
from evaluation.frechet import Reference, frechet_distance
from evaluation.networks.inception import FidInception
from evaluation.resizes import RESIZES
from evaluation.statistics import GaussianStatistics
from pipeline.sources import open_source
from pipeline.views import apply_view
from stages.errors import ArtefactError, ConfigError
from stages.options import EvaluationOptions, ImageOptions, SourceOptions

SIDE = 64  # of extractors that can work at any
PUBLISHED = ("efficientnet-lite0",)  # whose weights come with the packages of `make test`
BATCH = 3


def random_weights(cls: type, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Weights of the right names for what downloads its own: Inception in full, transformers of one narrow block."""
    if issubclass(cls, InceptionV3):
        shapes = {name: tuple(tensor.shape) for name, tensor in FidInception().state_dict().items()}
    else:
        shapes = vit_shapes(cls.is_clip, tokens=1 + (cls.native_resolution // PATCH) ** 2)
    return {name: random_tensor(name, shape, generator) for name, shape in shapes.items()}


def random_tensor(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Of a scale that neither blows activations up nor lets them die out."""
    values = torch.randn(shape, generator=generator)
    if len(shape) > 1:
        return values * (2.0 / math.prod(shape[1:])) ** 0.5
    if name.endswith("running_var"):
        return values.abs() + 0.5
    return 1.0 + 0.1 * values if name.endswith("weight") else 0.1 * values


@pytest.fixture(scope="module")
def weights_path(tmp_path_factory):
    """A folder of random weights for every extractor that has none here; they pass for the published files."""
    folder = tmp_path_factory.mktemp("weights")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("evaluation.batches.BATCH_SIZE", BATCH)
        for name in sorted(set(EXTRACTORS) - set(PUBLISHED)):
            cls = extractor_class(name)
            patch.setattr(cls, "FILE", dataclasses.replace(cls.FILE, sha256=""))
            if not (folder / cls.FILE.name).exists():
                torch.save(random_weights(cls, torch.Generator().manual_seed(0)), folder / cls.FILE.name)
        yield str(folder)


def options_of(name: str, weights_path: str, **changes) -> EvaluationOptions:
    if "resolution" not in changes and name in PUBLISHED:
        changes["resolution"] = SIDE
    changes["extractor_resolution"] = changes.pop("resolution", None)
    return EvaluationOptions(extractor=name, weights_path=weights_path, **changes)


@pytest.fixture(scope="module", params=sorted(EXTRACTORS))
def extractor(request, weights_path) -> Extractor:
    torch.set_num_threads(1)
    return open_extractor(request.param, options_of(request.param, weights_path))


@pytest.fixture(scope="module")
def scenes() -> np.ndarray:
    """uint8 (400, 32, 32, 3)."""
    options = ImageOptions(size=32)
    source = open_source(SourceOptions(num_images=400), options)
    uris = source.list_images("train")["uri"].to_pylist()
    return np.stack([apply_view(source.decode(source.fetch(uri)).image, "center", options) for uri in uris])


def pictures(n: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, 40, 40, channels), dtype=np.uint8)


@pytest.mark.parametrize("channels", [1, 3])
def test_every_output_is_finite_float32_of_the_declared_width(extractor, channels):
    outputs = list(extractor.outputs)
    found = extractor(pictures(2, channels), outputs)
    empty = extractor(pictures(0, channels), outputs)
    assert FEATURES in outputs and list(found) == outputs
    for name, width in extractor.outputs.items():
        assert found[name].shape == (2, width) and found[name].dtype == np.float32
        assert np.isfinite(found[name]).all() and np.ptp(found[name]) > 0
        assert empty[name].shape == (0, width)


def test_grey_is_the_same_as_grey_in_three_channels(extractor):
    grey = pictures(2, channels=1)
    np.testing.assert_array_equal(extractor(grey)[FEATURES], extractor(grey.repeat(3, axis=3))[FEATURES])


def test_features_do_not_depend_on_the_rest_of_the_batch(extractor):
    images = pictures(5)
    whole = extractor(images)[FEATURES]
    parts = np.concatenate([extractor(images[:1])[FEATURES], extractor(images[1:])[FEATURES]])
    np.testing.assert_allclose(parts, whole, rtol=1e-5, atol=1e-6)


def test_name_says_what_distances_mean(extractor):
    assert "@" in extractor.name and extractor.resize in RESIZES and extractor.name in distance_name(extractor)
    is_inception = extractor.family == "inception-v3"
    assert distance_name(extractor).startswith("FID" if is_inception else "Fréchet distance")


def test_fingerprints_are_stable_and_all_differ(weights_path, extractor):
    name = extractor.name.partition("@")[0]
    assert open_extractor(name, options_of(name, weights_path)).fingerprint == extractor.fingerprint
    assert len(extractor.fingerprint) == 64
    if name in PUBLISHED:
        other = options_of(name, weights_path, resolution=SIDE + 32)
        assert open_extractor(name, other).fingerprint != extractor.fingerprint
    if name == "inception-v3":
        clean = open_extractor("inception-v3-clean", options_of("inception-v3-clean", weights_path))
        assert clean.fingerprint != extractor.fingerprint and clean.resize != extractor.resize


@pytest.mark.parametrize("name", sorted(set(EXTRACTORS) - set(PUBLISHED)))
def test_without_weights_there_are_no_features(name, tmp_path):
    """Neither missing nor other weights are replaced by random ones."""
    cls = extractor_class(name)
    options = options_of(name, str(tmp_path))
    with pytest.raises(ConfigError, match=f"{name} needs {cls.FILE.name} in it. Put https://"):
        open_extractor(name, options)
    torch.save({"unrelated": torch.zeros(3)}, tmp_path / cls.FILE.name)
    with pytest.raises(ArtefactError, match=f"{cls.FILE.name}.*Fetch it again"):
        open_extractor(name, options)


def test_sides_that_a_network_does_not_have_are_refused(weights_path):
    for name in ("inception-v3", "clip-vitb32", "dinov2-vits14"):
        with pytest.raises(ConfigError, match="evaluation.extractor_resolution is 100"):
            open_extractor(name, options_of(name, weights_path, resolution=100))


@pytest.mark.parametrize("name", PUBLISHED)
def test_sees_real_images_alike_and_damaged_ones_apart(name, weights_path, scenes):
    """A split of real images is nearest, and more noise is further; raw pixels fail this."""
    extractor = open_extractor(name, options_of(name, weights_path))
    reference = Reference.of(GaussianStatistics.of(extractor(scenes[:200])[FEATURES]))
    generator = np.random.default_rng(0)
    real = scenes[200:]
    noise = generator.normal(size=real.shape)
    noisy = [np.clip(real + sigma * noise, 0, 255).astype(np.uint8) for sigma in (0, 10, 25, 60)]
    mosaics = [real[:, ::k, ::k].repeat(k, axis=1).repeat(k, axis=2) for k in (1, 2, 4, 8)]
    for ladder in (noisy, mosaics):
        features = [extractor(images)[FEATURES] for images in ladder]
        distances = [frechet_distance(GaussianStatistics.of(each), reference) for each in features]
        assert distances == sorted(distances) and distances[1] > 1.2 * distances[0]


def test_inception_without_its_last_layer_has_no_logits(weights_path, tmp_path):
    file = InceptionV3.FILE.name
    weights = torch.load(f"{weights_path}/{file}", weights_only=True)
    torch.save({name: tensor for name, tensor in weights.items() if not name.startswith("fc.")}, tmp_path / file)
    whole, headless = (open_extractor("inception-v3", options_of("inception-v3", str(path))) for path in (weights_path, tmp_path))
    found, expected = (extractor(pictures(2), [FEATURES, SPATIAL]) for extractor in (headless, whole))
    for name in (FEATURES, SPATIAL):
        np.testing.assert_array_equal(found[name], expected[name])
    assert output_width(whole, LOGITS) == 1008 and headless.fingerprint != whole.fingerprint
    with pytest.raises(ConfigError, match="evaluation.metrics needs the logits of inception-v3, but .* Put the published file"):
        output_width(headless, LOGITS)


def test_unknown_names_are_refused_with_what_is_allowed():
    for name in ("inception", "evaluation.extractors:Missing", "no_such_package.module:Class"):
        with pytest.raises(ConfigError, match=f"evaluation.extractor is {name}.*efficientnet-lite0"):
            open_extractor(name, EvaluationOptions(extractor=name))
