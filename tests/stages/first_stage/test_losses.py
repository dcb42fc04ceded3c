"""Losses of the first stage against numbers worked out by hand."""

import math

import pytest
import torch
import torch.nn.functional as F
from oracles import taming

from stages.first_stage.losses import (
    ADVERSARIAL_LOSSES,
    adaptive_weight,
    generator_loss,
    gradient_penalty,
    hinge_discriminator_loss,
    label_loss,
    last_layer_grad_norm,
    lecam_regularisation,
    logistic_discriminator_loss,
    non_saturating_generator_loss,
    ramp,
    reconstruction_loss,
)


def test_reconstruction_weighs_absolute_and_squared_differences():
    images, reconstructions = torch.zeros(1, 1, 1, 2), torch.tensor([[[[1.0, 3.0]]]])
    assert reconstruction_loss(images, reconstructions, 1.0, 0.0).item() == 2.0
    assert reconstruction_loss(images, reconstructions, 0.0, 1.0).item() == 5.0
    assert reconstruction_loss(images, reconstructions, 0.5, 0.1).item() == pytest.approx(1.5)


def test_hinge_is_one_for_an_undecided_discriminator_and_zero_for_a_sure_one():
    zeros = torch.zeros(4)
    assert hinge_discriminator_loss(zeros, zeros).item() == 1.0
    assert hinge_discriminator_loss(zeros + 2, zeros - 2).item() == 0.0
    assert hinge_discriminator_loss(zeros - 1, zeros + 1).item() == 2.0


def test_generator_wants_high_logits():
    assert generator_loss(torch.tensor([1.0, 3.0])).item() == -2.0


def test_adaptive_weight_is_the_capped_ratio():
    assert adaptive_weight(torch.tensor(2.0), torch.tensor(0.5), 1e4).item() == pytest.approx(2.0 / 0.5001)
    assert adaptive_weight(torch.tensor(2.0), torch.tensor(0.0), 100.0).item() == 100.0
    assert math.isfinite(adaptive_weight(torch.tensor(0.0), torch.tensor(0.0), 1e4).item())


@pytest.mark.parametrize("num_seen, expected", [(0, 0.0), (99, 0.0), (100, 0.0), (150, 0.5), (200, 1.0), (999, 1.0)])
def test_ramp_counts_images(num_seen, expected):
    assert ramp(num_seen, 100, 100) == expected


def test_ramp_without_length_is_a_step():
    assert [ramp(n, 100, 0) for n in (99, 100)] == [0.0, 1.0]


def logits(seed):
    return torch.randn(4, 1, 5, 5, generator=torch.Generator().manual_seed(seed)) * 2


def test_adversarial_losses_are_those_of_the_original():
    original = taming("modules.losses.vqperceptual")
    real, fake = logits(0), logits(1)
    torch.testing.assert_close(hinge_discriminator_loss(real, fake), original.hinge_d_loss(real, fake))
    torch.testing.assert_close(logistic_discriminator_loss(real, fake), original.vanilla_d_loss(real, fake))


def test_labels_are_judged_as_by_the_original():
    one_hot = F.one_hot(torch.randint(5, (2, 4, 4)), 5).permute(0, 3, 1, 2).float()
    outputs = torch.randn(2, 5, 4, 4)
    original = taming("modules.losses.segmentation").BCELossWithQuant(codebook_weight=1.0)
    expected, _ = original(torch.zeros(()), one_hot, outputs, "train")
    torch.testing.assert_close(label_loss(one_hot, outputs), expected)


def test_logistic_losses_by_hand():
    zeros = torch.zeros(3)
    assert logistic_discriminator_loss(zeros, zeros).item() == pytest.approx(math.log(2))
    assert non_saturating_generator_loss(zeros).item() == pytest.approx(math.log(2))
    assert non_saturating_generator_loss(torch.tensor([50.0])).item() == pytest.approx(0.0, abs=1e-6)
    # Swapped arguments of a cross entropy, as in a port of these losses, would not see which side is which.
    assert logistic_discriminator_loss(zeros + 5, zeros - 5) < 0.01 < logistic_discriminator_loss(zeros - 5, zeros + 5)


@pytest.mark.parametrize("name", ADVERSARIAL_LOSSES)
def test_each_player_gains_by_moving_logits_its_way(name):
    discriminator, generator = ADVERSARIAL_LOSSES[name]
    real, fake = torch.zeros(4, requires_grad=True), torch.zeros(4, requires_grad=True)
    discriminator(real, fake).backward()
    assert (real.grad < 0).all() and (fake.grad > 0).all()
    fake.grad = None
    generator(fake).backward()
    assert (fake.grad < 0).all()


def test_lecam_pulls_logits_back_to_the_other_sides_average():
    real_mean, fake_mean = torch.tensor(0.5), torch.tensor(-0.5)
    value = lecam_regularisation(torch.tensor([1.5]), torch.tensor([-1.5]), real_mean, fake_mean)
    assert value.item() == pytest.approx(4.0 + 4.0)
    assert lecam_regularisation(torch.tensor([-1.0]), torch.tensor([1.0]), real_mean, fake_mean).item() == 0.0


def test_gradient_penalty_of_a_linear_discriminator():
    weight = torch.tensor([1.0, -2.0, 2.0], requires_grad=True)
    inputs = torch.randn(5, 3, requires_grad=True)
    penalty = gradient_penalty(inputs @ weight, inputs)
    assert penalty.item() == pytest.approx(0.5 * 9.0)
    penalty.backward()
    torch.testing.assert_close(weight.grad, weight.detach())  # d/dw of |w|^2 / 2: it reaches the discriminator


def test_gradient_norm_keeps_the_graph_and_leaves_no_gradient_behind():
    weight = torch.tensor([3.0, 4.0], requires_grad=True)
    loss = (weight * torch.tensor([3.0, 4.0])).sum()
    assert last_layer_grad_norm(loss, weight).item() == 5.0
    assert weight.grad is None
    loss.backward()


def test_without_a_graph_the_adaptive_weight_is_an_error_not_zero():
    """The original catches RuntimeError here, and takes running out of memory for validation."""
    weight = torch.ones(2, requires_grad=True)
    with torch.no_grad():
        loss = weight.sum()
    with pytest.raises(RuntimeError):
        last_layer_grad_norm(loss, weight)


def test_adaptive_weight_carries_no_gradient():
    norm = torch.tensor(2.0, requires_grad=True)
    assert not adaptive_weight(norm, norm, 10.0).requires_grad
