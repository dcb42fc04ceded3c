import dataclasses

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from evaluation.pixel_metrics import PIXEL_METRICS, LpipsDistance, psnr, ssim
from stages.errors import ConfigError
from stages.first_stage.lpips import BLOCKS, WIDTHS
from stages.options import EvaluationOptions


def pictures(n: int, channels: int = 3) -> np.ndarray:
    noise = np.random.default_rng(0).normal(size=(n, 32, 32, channels))
    smooth = gaussian_filter(noise, (0, 2, 2, 0))
    return np.clip(128 + 300 * smooth, 0, 255).astype(np.uint8)


def test_psnr_of_known_errors():
    black = np.zeros((2, 8, 8, 3), np.uint8)
    other = black.copy()
    other[1] += 255
    assert psnr(black, black).tolist() == pytest.approx([100.0, 100.0])
    assert psnr(black, other).tolist() == pytest.approx([100.0, 0.0])
    assert psnr(black, black + 16)[0] == pytest.approx(20 * np.log10(255 / 16))


def test_ssim_is_the_published_formula():
    """Wang et al. 2004, equation 13, with scipy's Gaussian filter cut to 11 pixels."""
    x, y = (a[0, ..., 0].astype(np.float64) for a in (pictures(1, 1), pictures(2, 1)[1:]))

    def smooth(a: np.ndarray) -> np.ndarray:
        return gaussian_filter(a, 1.5, truncate=5 / 1.5, mode="mirror")

    mx, my = smooth(x), smooth(y)
    vx, vy, vxy = smooth(x * x) - mx**2, smooth(y * y) - my**2, smooth(x * y) - mx * my
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    values = (2 * mx * my + c1) * (2 * vxy + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    found = ssim(pictures(1, 1), pictures(2, 1)[1:])[0]
    assert found == pytest.approx(values.mean(), abs=1e-6)


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """Random weights that pass for LPIPS's published ones."""
    folder = tmp_path_factory.mktemp("weights")
    generator = torch.Generator().manual_seed(0)
    vgg, heads, inputs = {}, {}, 3
    for i, (block, width) in enumerate(zip(BLOCKS, WIDTHS, strict=True)):
        for position in block:
            scale = (2 / (9 * inputs)) ** 0.5
            vgg[f"features.{position}.weight"] = torch.randn(width, inputs, 3, 3, generator=generator) * scale
            vgg[f"features.{position}.bias"] = torch.zeros(width)
            inputs = width
        heads[f"lin{i}.model.1.weight"] = torch.rand(1, width, 1, 1, generator=generator)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("evaluation.batches.BATCH_SIZE", 4)
        for name in ("VGG", "HEADS"):
            patch.setattr(LpipsDistance, name, dataclasses.replace(getattr(LpipsDistance, name), sha256=""))
        for file, tensors in ((LpipsDistance.VGG, vgg), (LpipsDistance.HEADS, heads)):
            torch.save(tensors, folder / file.name)
        yield EvaluationOptions(weights_path=str(folder))


def test_lpips_without_its_weights_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="lpips needs vgg16-397923af.pth in it"):
        LpipsDistance(EvaluationOptions(weights_path=str(tmp_path)))


@pytest.mark.parametrize("name", sorted(PIXEL_METRICS))
@pytest.mark.parametrize("channels", [1, 3])
def test_worsens_with_noise_image_by_image(name, channels, options):
    metric = PIXEL_METRICS[name](options)
    images = pictures(6, channels)
    noise = np.random.default_rng(1).normal(size=images.shape)
    worse = [np.clip(images + sigma * noise, 0, 255).astype(np.uint8) for sigma in (0, 5, 20, 60)]
    values = np.array([metric(images, each) for each in worse])
    assert values.shape == (4, 6) and values.dtype == np.float64
    assert (np.diff(values, axis=0) * (1 if name == "lpips" else -1) > 0).all()
    np.testing.assert_allclose(metric(images[2:4], worse[2][2:4]), values[2, 2:4], rtol=1e-6)
    assert metric(images[:0], images[:0]).shape == (0,)


def test_ssim_of_tiny_images():
    images = pictures(2)[:, :8, :8]
    assert ssim(images, images).tolist() == pytest.approx([1.0, 1.0])
