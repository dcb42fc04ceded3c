"""The operations of the transformer give the values and gradients of PyTorch's own."""

import pytest
import torch
import torch.nn.functional as F

from stages.second_stage.operations import Linear, RMSNorm, add_dropout, attention, rotate, swiglu

TOLERANCES = {torch.float32: {"atol": 2e-5, "rtol": 1e-4}, torch.bfloat16: {"atol": 5e-2, "rtol": 2e-2}}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCES, ids=["fp32", "bf16"])


def inputs(*shapes, dtype=torch.float32):
    torch.manual_seed(0)
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def assert_same(ours, reference, variables):
    """Equal values, and equal gradients of a weighted sum of them, to what the dtype can tell apart."""
    result, expected = ours(), reference()
    assert result.dtype == expected.dtype and result.shape == expected.shape
    weights = torch.randn_like(expected)
    found = torch.autograd.grad(result, variables, weights)
    wanted = torch.autograd.grad(expected, variables, weights)
    for ours_one, reference_one in zip([result, *found], [expected, *wanted]):
        torch.testing.assert_close(ours_one, reference_one, **TOLERANCES[expected.dtype])


@DTYPES
@pytest.mark.parametrize("shape", [(2, 7, 24), (3, 24)])
@pytest.mark.parametrize("out_features", [8, 40])
def test_linear(dtype, shape, out_features):
    layer = Linear(24, out_features).to(dtype)
    (x,) = inputs(shape, dtype=dtype)
    assert_same(lambda: layer(x), lambda: F.linear(x, layer.weight), [x, layer.weight])


def test_linear_without_a_gradient_of_its_input():
    layer = Linear(24, 40)
    x = torch.randn(5, 24)
    layer(x).square().sum().backward()
    torch.testing.assert_close(layer.weight.grad, 2 * layer(x).detach().t() @ x, atol=1e-4, rtol=1e-4)


@DTYPES
def test_rms_norm(dtype):
    norm = RMSNorm(24).to(dtype)
    (x,) = inputs((2, 7, 3, 24), dtype=dtype)
    torch.nn.init.normal_(norm.weight)
    assert_same(lambda: norm(x), lambda: F.rms_norm(x, (24,), norm.weight, norm.eps), [x, norm.weight])


def test_rms_norm_of_zeros_is_zero():
    assert torch.equal(RMSNorm(8)(torch.zeros(1, 8)), torch.zeros(1, 8))


@DTYPES
def test_causal_attention(dtype):
    q, k, v = inputs(*[(2, 3, 9, 16)] * 3, dtype=dtype)
    assert_same(
        lambda: attention(q, k, v, is_causal=True),
        lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        [q, k, v],
    )


@DTYPES
def test_one_query_sees_everything(dtype):
    q, k, v = inputs((2, 3, 1, 16), (2, 3, 9, 16), (2, 3, 9, 16), dtype=dtype)
    assert_same(lambda: attention(q, k, v, is_causal=False), lambda: F.scaled_dot_product_attention(q, k, v), [q, k, v])


@DTYPES
def test_swiglu(dtype):
    (x,) = inputs((2, 7, 24), dtype=dtype)
    assert_same(lambda: swiglu(x), lambda: F.silu(x[..., :12]) * x[..., 12:], [x])


@DTYPES
def test_rotate(dtype):
    (x,) = inputs((2, 5, 3, 8), dtype=dtype)
    angles = torch.rand(5, 4)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)

    def by_complex_numbers():
        first, second = x.transpose(1, 2).float().chunk(2, dim=-1)
        turned = torch.complex(first, second) * torch.complex(cos.float(), sin.float())
        return torch.cat([turned.real, turned.imag], dim=-1).to(dtype)

    assert_same(lambda: rotate(x, cos, sin), by_complex_numbers, [x])


@DTYPES
def test_compiled_they_are_the_same(dtype):
    x, y = inputs((2, 7, 24), (2, 5, 3, 8), dtype=dtype)
    angles = torch.rand(5, 4)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    compiled_swiglu, compiled_rotate = (torch.compile(f, backend="aot_eager", fullgraph=True) for f in (swiglu, rotate))
    assert_same(lambda: compiled_swiglu(x), lambda: swiglu(x), [x])
    assert_same(lambda: compiled_rotate(y, cos, sin), lambda: rotate(y, cos, sin), [y])


@DTYPES
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_drops_its_share_and_keeps_the_mean(dtype, p):
    torch.manual_seed(0)
    residual = torch.zeros(400, 501, dtype=dtype)
    branch = torch.ones(400, 501, dtype=dtype, requires_grad=True)
    result = add_dropout(residual, branch, p, True)
    kept = result != 0
    assert abs((~kept).float().mean().item() - p) < 4 * (p * (1 - p) / kept.numel()) ** 0.5
    torch.testing.assert_close(result[kept].float(), torch.full_like(result[kept], 1 / (1 - p)).float())
    neighbours = (kept[:, 1:] == kept[:, :-1]).float().mean().item()
    assert abs(neighbours - (p**2 + (1 - p) ** 2)) < 0.005, "elements are dropped independently"
    (grad,) = torch.autograd.grad(result.sum(), branch)
    assert torch.equal(grad, result)


def test_dropout_follows_the_seed_and_stops_after_training():
    residual, branch = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(add_dropout(residual, branch, 0.5, True))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert torch.equal(add_dropout(residual, branch, 0.5, False), residual + branch)
    assert torch.equal(add_dropout(residual, branch, 0.0, True), residual + branch)
