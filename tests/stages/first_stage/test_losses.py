"""Losses of the first stage against numbers worked out by hand."""

import math

import pytest
import torch

from stages.first_stage.losses import (
    adaptive_weight,
    generator_loss,
    hinge_discriminator_loss,
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
