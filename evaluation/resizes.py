"""Resizes before an extractor, by name. The name goes into every record: a distance changes with the resize."""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor


def bilinear_antialias(images: np.ndarray, side: int) -> Tensor:
    """Bilinear with antialiasing, by PyTorch."""
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float()
    return F.interpolate(x, size=(side, side), mode="bilinear", antialias=True, align_corners=False)


def tf1_bilinear(images: np.ndarray, side: int) -> Tensor:
    """Bilinear as TensorFlow 1 does it inside the graph of FID: corners aligned at the top left, no antialiasing."""
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float()
    (top, bottom, down), (left, right, across) = (_tf1_taps(size, side) for size in x.shape[2:])
    x = x[..., left] + (x[..., right] - x[..., left]) * across
    return x[..., top, :] + (x[..., bottom, :] - x[..., top, :]) * down[:, None]


def _tf1_taps(size: int, side: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of each output position: the input positions before and after it, and how far it is from the first."""
    position = torch.arange(side, dtype=torch.float32) * torch.tensor(size / side, dtype=torch.float32)
    low = position.long()
    return low, (low + 1).clamp_max(size - 1), position - low


def clean_bicubic(images: np.ndarray, side: int) -> Tensor:
    """Bicubic with antialiasing by Pillow, channel by channel in float, clipped to what pixels can be ("clean": Parmar, Zhang and
    Zhu 2022; clean-fid 0.1.35)."""
    return bicubic_antialias(images, side).clamp_(0.0, 255.0)


def bicubic_antialias(images: np.ndarray, side: int) -> Tensor:
    """The same with what bicubic overshoots at edges left in, as the JAX code of CMMD has it (Jayasumana et al. 2024)."""
    channels = np.moveaxis(images, -1, 1).astype(np.float32)
    resized = np.empty((*channels.shape[:2], side, side), np.float32)
    for index in np.ndindex(*channels.shape[:2]):
        resized[index] = Image.fromarray(channels[index]).resize((side, side), Image.Resampling.BICUBIC)
    return torch.from_numpy(resized)


# uint8 (n, H, W, C), C in {1, 3}, to float32 (n, C, side, side) in 0..255, or around it with "bicubic-antialias".
RESIZES: dict[str, Callable[[np.ndarray, int], Tensor]] = {
    "bilinear-antialias": bilinear_antialias,
    "tf1-bilinear": tf1_bilinear,
    "clean-bicubic": clean_bicubic,
    "bicubic-antialias": bicubic_antialias,
}
