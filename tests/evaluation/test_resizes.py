import numpy as np
import pytest
import torch
from fidelity_support import fidelity
from PIL import Image

from evaluation.resizes import RESIZES, bicubic_antialias, clean_bicubic, tf1_bilinear


def pictures(n: int, height: int, width: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, height, width, channels), dtype=np.uint8)


@pytest.mark.parametrize("height, width", [(28, 28), (32, 40), (256, 256), (299, 299), (400, 500)])
def test_tf1_resize_equals_torch_fidelity(height, width):
    theirs = fidelity("interpolate_compat_tensorflow").interpolate_bilinear_2d_like_tensorflow1x
    images = pictures(2, height, width)
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float()
    torch.testing.assert_close(tf1_bilinear(images, 299), theirs(x, (299, 299), align_corners=False), rtol=0, atol=0)


@pytest.mark.parametrize("side", [24, 96])
def test_clean_resize_is_that_of_clean_fid(side):
    images = pictures(2, 60, 44)
    found = clean_bicubic(images, side).numpy()
    assert found.shape == (2, 3, side, side) and found.dtype == np.float32
    for image, resized in zip(images, found):
        for channel in range(3):  # clean-fid 0.1.35, resize.py: each channel as a float image, then clipped
            alone = Image.fromarray(image[..., channel].astype(np.float32)).resize((side, side), Image.Resampling.BICUBIC)
            assert np.array_equal(resized[channel], np.asarray(alone).clip(0, 255))


def test_the_resize_of_clip_keeps_what_bicubic_overshoots():
    images = pictures(2, 60, 44)
    found = bicubic_antialias(images, 96)
    assert found.min() < 0 and found.max() > 255
    torch.testing.assert_close(found.clamp(0, 255), clean_bicubic(images, 96), rtol=0, atol=0)


@pytest.mark.parametrize("name", sorted(RESIZES))
def test_every_resize_keeps_constants_channels_and_the_batch_apart(name):
    resize = RESIZES[name]
    for channels in (1, 3):
        constant = np.full((2, 20, 30, channels), 77, np.uint8)
        np.testing.assert_allclose(resize(constant, 48).numpy(), 77.0, rtol=1e-6)
    images = pictures(3, 40, 40)
    torch.testing.assert_close(resize(images[1:2], 29)[0], resize(images, 29)[1], rtol=0, atol=0)


def test_only_the_resizes_of_today_antialias():
    stripes = np.zeros((1, 128, 128, 1), np.uint8)
    stripes[:, :, ::4] = 255
    spread = {name: float(resize(stripes, 32).std()) for name, resize in RESIZES.items()}
    assert spread["tf1-bilinear"] == 0.0 and float(tf1_bilinear(stripes, 32).mean()) == 255.0
    for name in ("bilinear-antialias", "clean-bicubic"):
        assert float(RESIZES[name](stripes, 32).mean()) == pytest.approx(255 / 4, rel=0.05)
