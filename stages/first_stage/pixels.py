"""Between uint8 pixels and what the networks see. The only place where pixel scaling is defined."""

import torch
import torch.nn.functional as F
from torch import Tensor


def to_float(images: Tensor) -> Tensor:
    """uint8 (B, H, W, C) in 0..255 to float32 (B, C, H, W) in [-1, 1] by x / 127.5 - 1, as the original system."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1.0


def to_one_hot(labels: Tensor, num_labels: int) -> Tensor:
    """uint8 ids (B, H, W, 1) to float32 (B, num_labels, H, W) of 0 and 1, as the original system's segmentation tokenizers."""
    return F.one_hot(labels[..., 0].long(), num_labels).permute(0, 3, 1, 2).float()


def to_input(pixels: Tensor, num_labels: int | None) -> Tensor:
    """What a tokenizer takes of uint8 pixels: `to_float`, or with `num_labels` `to_one_hot`."""
    return to_float(pixels) if num_labels is None else to_one_hot(pixels, num_labels)


def from_output(outputs: Tensor, num_labels: int | None) -> Tensor:
    """What a tokenizer's decoder gives (B, C, H, W) as uint8 (B, H, W, C): `to_uint8`, or with `num_labels` the likeliest ids, C = 1."""
    if num_labels is None:
        return to_uint8(outputs)
    return outputs.argmax(dim=1, keepdim=True).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def to_uint8(images: Tensor) -> Tensor:
    """Float (B, C, H, W) around [-1, 1], clamped, to uint8 (B, H, W, C), truncating as the original system does."""
    scaled = (images.float().clamp(-1.0, 1.0) + 1.0) * 127.5
    return scaled.to(torch.uint8).permute(0, 2, 3, 1).contiguous()
