"""Finite scalar quantization: a grid in [-1, 1]."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stages.first_stage.quantizers.fsq import ScalarQuantizer

levels_strategy = st.lists(st.integers(3, 9), min_size=1, max_size=4).map(tuple)


@given(levels_strategy)
def test_the_codebook_is_the_grid(levels):
    quantizer = ScalarQuantizer(levels)
    grids = [(torch.arange(n) - n // 2) / (n // 2) for n in levels]
    expected = torch.cartesian_prod(*grids[::-1]).view(-1, len(levels)).flip(-1)  # the first dimension counts fastest
    assert quantizer.codebook_size == math.prod(levels) == len(expected)
    torch.testing.assert_close(quantizer.codebook(), expected)


@given(levels_strategy, st.integers(0, 1000))
def test_the_code_is_the_nearest_level_of_the_bounded_vector(levels, seed):
    quantizer = ScalarQuantizer(levels)
    vectors = 3.0 * torch.randn(50, len(levels), generator=torch.Generator().manual_seed(seed))
    chosen = quantizer.code_vectors(quantizer.assign(vectors)) * torch.tensor([n // 2 for n in levels])
    assert (quantizer.bounded(vectors) - chosen).abs().max() <= 0.5 + 1e-3


def test_every_level_can_be_reached_and_zero_is_one():
    quantizer = ScalarQuantizer((8, 5))
    line = torch.linspace(-5, 5, 2001)
    assert len(quantizer.assign(torch.stack([line, torch.zeros(2001)], -1)).unique()) == 8
    assert len(quantizer.assign(torch.stack([torch.zeros(2001), line], -1)).unique()) == 5
    assert torch.equal(quantizer.code_vectors(quantizer.assign(torch.zeros(1, 2))), torch.zeros(1, 2))


def test_the_bound_keeps_zero_and_the_gradient_is_that_of_the_bound():
    quantizer = ScalarQuantizer((8, 5, 4))
    torch.testing.assert_close(quantizer.bounded(torch.zeros(1, 3)), torch.zeros(1, 3), atol=1e-6, rtol=0)
    z = torch.randn(1, 3, 2, 2, requires_grad=True)
    (found,) = torch.autograd.grad(quantizer(z).z_BDHW.sum(), z)
    vectors = z.permute(0, 2, 3, 1).reshape(-1, 3)
    (expected,) = torch.autograd.grad((quantizer.bounded(vectors) / torch.tensor([4, 2, 2])).sum(), z)
    torch.testing.assert_close(found, expected)


def test_there_is_nothing_to_learn():
    quantizer = ScalarQuantizer((8, 5))
    assert not quantizer.state_dict() and not list(quantizer.parameters())
    assert quantizer(torch.randn(1, 2, 2, 2)).losses == {}


@pytest.mark.parametrize("level", [3, 4])
def test_extremes_stay_in_range(level):
    quantizer = ScalarQuantizer((level, level))
    codes = quantizer.assign(torch.tensor([[-1e6, -1e6], [1e6, 1e6]]))
    assert codes.tolist() == [0, level * level - 1]
