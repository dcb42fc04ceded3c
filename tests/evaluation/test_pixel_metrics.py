import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from evaluation.pixel_metrics import PIXEL_METRICS, psnr, ssim


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


@pytest.mark.parametrize("name", sorted(PIXEL_METRICS))
@pytest.mark.parametrize("channels", [1, 3])
def test_falls_with_noise_image_by_image(name, channels):
    images = pictures(6, channels)
    noise = np.random.default_rng(1).normal(size=images.shape)
    worse = [np.clip(images + sigma * noise, 0, 255).astype(np.uint8) for sigma in (0, 5, 20, 60)]
    values = np.array([PIXEL_METRICS[name](images, each) for each in worse])
    assert values.shape == (4, 6) and values.dtype == np.float64
    assert (np.diff(values, axis=0) < 0).all()
    np.testing.assert_array_equal(PIXEL_METRICS[name](images[2:4], worse[2][2:4]), values[2, 2:4])
    assert PIXEL_METRICS[name](images[:0], images[:0]).shape == (0,)


def test_ssim_of_tiny_images():
    images = pictures(2)[:, :8, :8]
    assert ssim(images, images).tolist() == pytest.approx([1.0, 1.0])
