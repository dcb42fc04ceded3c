"""Losses of the first stage as pure functions (Esser et al. 2020, eq. 4 to 7; formulas as in CompVis/taming-transformers).

All are computed in float32 whatever the autocast mode.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

DELTA = 1e-4  # keeps the adaptive weight finite; the paper says 1e-6, the original's code this


def reconstruction_loss(images: Tensor, reconstructions: Tensor, l1_weight: float, l2_weight: float) -> Tensor:
    """Mean absolute and mean squared pixel difference, each with its weight."""
    difference = reconstructions.float() - images.float()
    return l1_weight * difference.abs().mean() + l2_weight * difference.square().mean()


def label_loss(one_hot: Tensor, logits: Tensor) -> Tensor:
    """Mean binary cross entropy over every pixel and label of (B, num_labels, H, W), one_hot in {0, 1}."""
    return F.binary_cross_entropy_with_logits(logits.float(), one_hot.float())


def hinge_discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """1/2 (mean relu(1 - D(x)) + mean relu(1 + D(x_hat))); 1 for an undecided discriminator."""
    return 0.5 * (F.relu(1.0 - real_logits.float()).mean() + F.relu(1.0 + fake_logits.float()).mean())


def logistic_discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """1/2 (mean softplus(-D(x)) + mean softplus(D(x_hat))), Goodfellow et al. 2014; ln 2 for an undecided discriminator."""
    return 0.5 * (F.softplus(-real_logits.float()).mean() + F.softplus(fake_logits.float()).mean())


def generator_loss(fake_logits: Tensor) -> Tensor:
    """-mean D(x_hat). Can be negative, and with it the sum of all losses."""
    return -fake_logits.float().mean()


def non_saturating_generator_loss(fake_logits: Tensor) -> Tensor:
    """mean softplus(-D(x_hat)), Goodfellow et al. 2014, section 3."""
    return F.softplus(-fake_logits.float()).mean()


# By `tokenizer_train.discriminator_loss`: the discriminator's loss and the generator's.
ADVERSARIAL_LOSSES = {
    "hinge": (hinge_discriminator_loss, generator_loss),
    "vanilla": (logistic_discriminator_loss, generator_loss),
    "non-saturating": (logistic_discriminator_loss, non_saturating_generator_loss),
}


def lecam_regularisation(real_logits: Tensor, fake_logits: Tensor, real_mean: Tensor, fake_mean: Tensor) -> Tensor:
    """How far logits lie beyond the moving average of the other side (Tseng et al. 2021, eq. 3, one-sided as in their code).

    Args:
        real_logits: of images.
        fake_logits: of reconstructions.
        real_mean: moving average of the mean logit of images, a scalar.
        fake_mean: that of reconstructions.
    """
    real = F.relu(real_logits.float() - fake_mean).square().mean()
    return real + F.relu(real_mean - fake_logits.float()).square().mean()


def gradient_penalty(real_logits: Tensor, images: Tensor) -> Tensor:
    """1/2 of the mean squared norm of dD(x)/dx (R1, Mescheder et al. 2018, eq. 9). `images` must require gradients."""
    (gradient,) = torch.autograd.grad(real_logits.sum(), images, create_graph=True)
    return 0.5 * gradient.float().square().flatten(1).sum(1).mean()


def adaptive_weight(reconstruction_grad_norm: Tensor, generator_grad_norm: Tensor, cap: float) -> Tensor:
    """Ratio of the two losses' gradients at the decoder's last layer (eq. 7), from 0 to `cap`, detached."""
    return (reconstruction_grad_norm / (generator_grad_norm + DELTA)).clamp(0.0, cap).detach()


def ramp(num_seen: int, start: int, length: int) -> float:
    """0 before `start` images, then rising linearly to 1 over `length` images; 1 from `start` on if that is 0."""
    if num_seen < start:
        return 0.0
    return 1.0 if length == 0 else min(1.0, (num_seen - start) / length)


def last_layer_grad_norm(loss: Tensor, weight: Tensor) -> Tensor:
    """Norm of the gradient of `loss` with respect to one weight, in float32, keeping the graph.

    Raises:
        RuntimeError: there is no graph, as within torch.no_grad().
    """
    (gradient,) = torch.autograd.grad(loss, weight, retain_graph=True)
    return gradient.float().norm()
