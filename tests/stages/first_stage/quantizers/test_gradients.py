"""The two ways a gradient passes from entries to the encoder."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from stages.first_stage.quantizers.gradients import GRADIENTS, rotate


@pytest.mark.parametrize("name", GRADIENTS)
def test_the_value_is_the_entry(name):
    vectors, entries = torch.randn(20, 6), torch.randn(20, 6)
    torch.testing.assert_close(GRADIENTS[name](vectors, entries), entries)


@given(st.integers(0, 10_000), st.integers(2, 12))
def test_the_rotation_turns_the_vector_onto_the_entry(seed, dim):
    generator = torch.Generator().manual_seed(seed)
    z, q, g = torch.randn(3, dim, generator=generator, dtype=torch.float64)
    leaf = z[None].clone().requires_grad_()
    (rotate(leaf, q[None]) * g).sum().backward()
    matrix = torch.stack([rotate_gradient(z, q, row) for row in torch.eye(dim, dtype=torch.float64)])
    scale = q.norm() / z.norm()
    torch.testing.assert_close(matrix @ z, q)
    torch.testing.assert_close(matrix @ matrix.t(), scale**2 * torch.eye(dim, dtype=torch.float64))
    assert torch.linalg.det(matrix) > 0, "a rotation, no reflection"
    torch.testing.assert_close(leaf.grad[0], matrix.t() @ g)


def rotate_gradient(z, q, g):
    leaf = z[None].clone().requires_grad_()
    (rotate(leaf, q[None]) * g).sum().backward()
    return leaf.grad[0]


def test_the_gradient_keeps_its_angle_to_the_vector():
    """Fifty et al. 2024, section 4.2: what the straight-through gradient does not do."""
    z, q, g = torch.randn(3, 5)
    moved = rotate_gradient(z, q, g)
    torch.testing.assert_close(F.cosine_similarity(moved, z, dim=0), F.cosine_similarity(g, q, dim=0))


def test_where_there_is_no_rotation_gradients_stay_finite():
    vectors = torch.tensor([[0.0, 0.0], [1.0, 0.0], [2.0, 0.0]], requires_grad=True)
    entries = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [2.0, 0.0]])
    passed = rotate(vectors, entries)
    torch.testing.assert_close(passed, entries)
    passed.sum().backward()
    assert vectors.grad.isfinite().all()
    torch.testing.assert_close(vectors.grad[2], torch.ones(2)), "nothing to turn"
