"""Metrics of reconstructions, image by image. Each maps two uint8 arrays (n, H, W, C) to float64 (n,)."""

from collections.abc import Callable

import numpy as np
import torch
from torchmetrics.functional.image import structural_similarity_index_measure

# Identical images have no finite PSNR.
MAX_PSNR = 100.0


def psnr(images: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio in dB, at most 100."""
    error = images.astype(np.float64) - others.astype(np.float64)
    mean_square = np.mean(error**2, axis=(1, 2, 3))
    floor = 255.0**2 / 10 ** (MAX_PSNR / 10)
    return 10.0 * np.log10(255.0**2 / np.maximum(mean_square, floor))


def ssim(images: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Structural similarity, at most 1 (Wang et al. 2004): Gaussian window of 11 pixels and deviation 1.5, mean over
    all positions (borders mirrored) and channels."""
    if len(images) == 0:
        return np.empty(0)
    x, y = (torch.from_numpy(np.array(a)).permute(0, 3, 1, 2).double() for a in (images, others))
    values = structural_similarity_index_measure(x, y, data_range=255.0, reduction="none")
    assert isinstance(values, torch.Tensor)
    return values.reshape(-1).numpy()


PIXEL_METRICS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {"psnr": psnr, "ssim": ssim}
