"""Losses of the first stage as pure functions (Esser et al. 2020, eq. 4 to 7; formulas as in CompVis/taming-transformers)."""

import torch
import torch.nn.functional as F
from torch import Tensor


def reconstruction_loss(images: Tensor, reconstructions: Tensor, l1_weight: float, l2_weight: float) -> Tensor:
    """Mean absolute and mean squared pixel difference in float32, each with its weight."""
    difference = reconstructions.float() - images.float()
    return l1_weight * difference.abs().mean() + l2_weight * difference.square().mean()


def hinge_discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """1/2 (mean relu(1 - D(x)) + mean relu(1 + D(x_hat))); 1 for an undecided discriminator."""
    return 0.5 * (F.relu(1.0 - real_logits.float()).mean() + F.relu(1.0 + fake_logits.float()).mean())


def generator_loss(fake_logits: Tensor) -> Tensor:
    """-mean D(x_hat). Can be negative."""
    return -fake_logits.float().mean()


def adaptive_weight(reconstruction_grad_norm: Tensor, generator_grad_norm: Tensor, cap: float) -> Tensor:
    """Ratio of the two losses' gradients at the decoder's last layer (eq. 7, with the original's delta of 1e-4), capped."""
    return (reconstruction_grad_norm / (generator_grad_norm + 1e-4)).clamp(0.0, cap).detach()


def ramp(num_seen: int, start: int, length: int) -> float:
    """0 before `start` images, then rising linearly to 1 over `length` images."""
    if num_seen < start:
        return 0.0
    return 1.0 if length == 0 else min(1.0, (num_seen - start) / length)


def last_layer_grad_norm(loss: Tensor, weight: Tensor) -> Tensor:
    """Norm of the gradient of `loss` with respect to one weight, keeping the graph."""
    (gradient,) = torch.autograd.grad(loss, weight, retain_graph=True)
    return gradient.float().norm()
