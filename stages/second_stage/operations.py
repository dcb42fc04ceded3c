"""Operations of the transformer, each as fast as its device allows.

On accelerators they are PyTorch's fused ones. On CPUs several of those are far from what the processor can do, and others that give the
same values, or in bfloat16 the same to about its rounding, take their place; docs/results/training.md has the measurements. Backward passes
of SwiGLU and rotations of our own make way where a compiler looks on, since plain formulas leave it the choice.

Shapes: B batch, T positions, C width, H heads, D head size.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Linear):
    """`linear` as a layer."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False):
        super().__init__(in_features, out_features, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang and Sennrich 2019)."""

    def __init__(self, size: int, eps: float = 1e-6):
        super().__init__(size, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu" and x.dtype == self.weight.dtype:
            return _CpuRMSNorm.apply(x, self.weight, self.eps)
        return super().forward(x)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight^T + bias. In float32 on a CPU oneDNN multiplies, which on AMD processors is twice as fast as MKL."""
    if x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        product = _OneDnnLinear.apply(x, weight)
        return product if bias is None else product + bias
    return F.linear(x, weight, bias)


def attention(q_BHTD: Tensor, k_BHTD: Tensor, v_BHTD: Tensor, *, is_causal: bool) -> Tensor:
    """softmax(q k^T / sqrt(D)) v, (B, H, T, D). With `is_causal`, q, k and v have the same positions and none sees a later one.

    PyTorch's CPU kernel multiplies bfloat16 in float32. Two bfloat16 products are twice as fast; as they round the scores, the result is
    off by 0.3 % instead of 0.2 %.
    """
    if not (is_causal and q_BHTD.device.type == "cpu" and q_BHTD.dtype == torch.bfloat16):
        return F.scaled_dot_product_attention(q_BHTD, k_BHTD, v_BHTD, is_causal=is_causal)
    q, k, v = (x.flatten(0, 1) for x in (q_BHTD, k_BHTD, v_BHTD))
    num_positions = q.shape[1]
    later = torch.full((num_positions, num_positions), -torch.inf, dtype=q.dtype).triu(1)
    scores = torch.baddbmm(later, q, k.transpose(1, 2), alpha=q.shape[-1] ** -0.5)
    return torch.bmm(scores.softmax(-1), v).view(v_BHTD.shape)


def add_dropout(residual: Tensor, branch: Tensor, p: float, training: bool) -> Tensor:
    """residual + dropout(branch).

    On a CPU the mask comes from 16 random bits per element instead of a Bernoulli draw, which costs six times as much; p is rounded to
    a multiple of 2^-16.
    """
    if not training or p == 0 or branch.device.type != "cpu":
        return residual + F.dropout(branch, p, training)
    num_dropped = round(p * 2**16)  # of 2^16 values
    words = torch.empty(-(-branch.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    bits = words.view(torch.int16)[: branch.numel()].view(branch.shape)
    mask = torch.ge(bits, num_dropped - 2**15, out=torch.empty_like(branch, requires_grad=False))
    return torch.addcmul(residual, branch, mask.mul_(2**16 / (2**16 - num_dropped)))


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of gate and up side by side in the last dimension (Shazeer 2020)."""
    if torch.compiler.is_compiling():
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up
    return _SwiGLU.apply(gate_up)


def rotate(x_BTHD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    """Rotates pairs (first half, second half) of the last dimension by the angles behind cos and sin, (T, D / 2); gives (B, H, T, D)."""
    if torch.compiler.is_compiling():
        first, second = x_BTHD.transpose(1, 2).chunk(2, dim=-1)
        return torch.cat([first * cos_TD - second * sin_TD, second * cos_TD + first * sin_TD], dim=-1)
    return _Rotate.apply(x_BTHD, cos_TD, sin_TD)


class _OneDnnLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _multiply(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        grad_x = _multiply(grad, weight.t()) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return grad_x, None
        grad, x = grad.flatten(0, -2), x.flatten(0, -2)
        if grad.shape[1] <= x.shape[1]:  # the first factor is copied, so it should be the smaller
            return grad_x, _multiply(grad.t(), x.t())
        return grad_x, _multiply(x.t(), grad.t()).t()


def _multiply(a: Tensor, b: Tensor) -> Tensor:
    """a @ b^T by oneDNN, which PyTorch calls for float32 by no public name."""
    return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")


class _CpuRMSNorm(torch.autograd.Function):
    """PyTorch composes the backward pass on CPUs of a dozen passes over memory; these are five."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_().to(x.dtype)
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        normed = x * scale
        product = (grad * normed).flatten(0, -2)
        mean = torch.mv(product, weight).div_(-x.shape[-1]).view(scale.shape)
        return torch.addcmul(grad * weight, normed, mean).mul_(scale), product.sum(0), None


class _SwiGLU(torch.autograd.Function):
    """The gradients of the two halves are written side by side, where autograd would concatenate them."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        activated = F.silu(gate)
        ctx.save_for_backward(gate_up, activated)
        return activated * up

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        gate_up, activated = ctx.saved_tensors
        (gate, up), out = gate_up.chunk(2, dim=-1), torch.empty_like(gate_up)
        grad_gate, grad_up = out.chunk(2, dim=-1)
        torch.mul(grad, activated, out=grad_up)
        torch.ops.aten.silu_backward(grad * up, gate, grad_input=grad_gate)
        return out


class _Rotate(torch.autograd.Function):
    """The gradient is the rotation back, so nothing but the angles is kept."""

    @staticmethod
    def forward(ctx: Any, x_BTHD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
        ctx.save_for_backward(cos_TD, sin_TD)
        b, t, h, d = x_BTHD.shape
        return _rotated(x_BTHD.transpose(1, 2), cos_TD, sin_TD, x_BTHD.new_empty(b, h, t, d))

    @staticmethod
    def backward(ctx: Any, grad_BHTD: Tensor) -> tuple[Tensor, None, None]:
        cos_TD, sin_TD = ctx.saved_tensors
        b, h, t, d = grad_BHTD.shape
        out = grad_BHTD.new_empty(b, t, h, d)
        _rotated(grad_BHTD, cos_TD, -sin_TD, out.transpose(1, 2))
        return out, None, None


def _rotated(x_BHTD: Tensor, cos_TD: Tensor, sin_TD: Tensor, out_BHTD: Tensor) -> Tensor:
    """Writes a rotation to `out_BHTD`, half by half."""
    first, second = x_BHTD.chunk(2, dim=-1)
    out_first, out_second = out_BHTD.chunk(2, dim=-1)
    torch.mul(first, cos_TD, out=out_first).addcmul_(second, sin_TD, value=-1)
    torch.mul(second, cos_TD, out=out_second).addcmul_(first, sin_TD)
    return out_BHTD
