"""3x3 convolutions of a frozen network on CPUs, with four ninths of the multiplications.

Winograd's F(2x2, 3x3) as Lavin and Gray (2016, "Fast Algorithms for Convolutional Neural Networks", eq. 8) use it: input tiles
of 4x4, which overlap by two, and kernels are transformed so that 16 matrix products make output tiles of 2x2. In float32 it is as
exact as the direct sum, whose additions are more numerous; larger tiles save more and lose digits.

Shapes: B batch, H and W spatial, C channels in, K channels out, S the 16 places of a transformed tile, T tiles of a strip.
"""

import numpy as np
import torch
from numba import njit
from torch import Tensor, nn

TILE = 16  # values of a transformed tile
MIN_CHANNELS = 128  # below, the transforms cost more than the products save
STRIP_VALUES = 1 << 15  # of one place of a strip of tiles: input and products of a strip stay in a core's cache

# G of Lavin and Gray: a kernel g becomes G g G^T.
KERNEL_TRANSFORM = torch.tensor([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]], dtype=torch.float64)


def use_winograd(network: nn.Module) -> None:
    """Replaces the 3x3 convolutions of a frozen network by ones that work so; parameters and their names stay."""
    for module in list(network.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Conv2d and _is_suitable(child):
                setattr(module, name, WinogradConv2d(child))


def _is_suitable(conv: nn.Conv2d) -> bool:
    is_plain = conv.groups == 1 and conv.dilation == (1, 1) and conv.padding_mode == "zeros" and conv.bias is not None
    is_3x3 = conv.kernel_size == (3, 3) and conv.stride == (1, 1) and conv.padding == (1, 1)
    return is_plain and is_3x3 and min(conv.in_channels, conv.out_channels) >= MIN_CHANNELS


class WinogradConv2d(nn.Conv2d):
    """Takes the weights of a frozen convolution; what it cannot do faster, the convolution does as before.

    Faster is float32 outside autocast, channels last, even height and width, on a CPU, in inference mode or under no_grad.
    """

    def __init__(self, conv: nn.Conv2d):
        super().__init__(conv.in_channels, conv.out_channels, 3, padding=1, device="meta")
        self.weight, self.bias = conv.weight, conv.bias
        self._kernel_SCK: Tensor | None = None  # of the weights as they are at first use

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Features (B, C, H, W) to (B, K, H, W)."""
        if not self._is_faster(x_BCHW):
            return super().forward(x_BCHW)
        if self._kernel_SCK is None:
            self._kernel_SCK = transform_kernel(self.weight)
        assert self.bias is not None
        return convolve(x_BCHW, self._kernel_SCK, self.bias)

    def _is_faster(self, x_BCHW: Tensor) -> bool:
        is_float = x_BCHW.dtype == self.weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
        is_frozen = x_BCHW.device.type == "cpu" and not torch.is_grad_enabled()
        is_even = x_BCHW.shape[2] % 2 == 0 and x_BCHW.shape[3] % 2 == 0
        return is_float and is_frozen and is_even and x_BCHW.is_contiguous(memory_format=torch.channels_last)


def transform_kernel(weight_KC33: Tensor) -> Tensor:
    """Kernels (K, C, 3, 3) as matrices (S, C, K), each in memory of its own."""
    g = KERNEL_TRANSFORM
    kernel = torch.einsum("ai,kcij,bj->abck", g, weight_KC33.detach().double(), g)
    return kernel.flatten(0, 1).float().contiguous()


def convolve(x_BCHW: Tensor, kernel_SCK: Tensor, bias_K: Tensor) -> Tensor:
    """A convolution with transformed kernels, float32, channels last, of even height and width; zeros are around the image."""
    b, c, h, w = x_BCHW.shape
    k = kernel_SCK.shape[2]
    y_BKHW = torch.empty(b, k, h, w, memory_format=torch.channels_last)
    x_RWC = x_BCHW.detach().permute(0, 2, 3, 1).reshape(b * h, w, c).numpy()
    y_RWK = y_BKHW.permute(0, 2, 3, 1).view(b * h, w, k).numpy()
    num_rows, across = b * h // 2, w // 2  # of tiles, over all images
    strip = min(max(STRIP_VALUES // (max(c, k) * across), 1), num_rows)
    tiles_STC, products_STK = (torch.empty(TILE, strip * across, n) for n in (c, k))
    rows_4WC = np.zeros((4, w + 2, c), np.float32)
    for first in range(0, num_rows, strip):
        last = min(first + strip, num_rows)
        used = slice(0, (last - first) * across)
        _transform_input(x_RWC, h, first, last, rows_4WC, tiles_STC.numpy())
        torch.bmm(tiles_STC[:, used], kernel_SCK, out=products_STK[:, used])
        _transform_output(products_STK.numpy(), bias_K.detach().numpy(), first, last, y_RWK)
    return y_BKHW


@njit(nogil=True, cache=True)
def _transform_input(x_RWC, height, first, last, rows_4WC, tiles_STC):  # type: ignore[no-untyped-def]
    """Writes B^T d B of the rows of tiles from first to last. The outer columns of `rows_4WC` are zero and stay so."""
    across, channels = x_RWC.shape[1] // 2, x_RWC.shape[2]
    zeros = np.zeros(x_RWC.shape[1:], x_RWC.dtype)
    for tile_row in range(first, last):
        row = 2 * tile_row
        above = x_RWC[row - 1] if row % height else zeros
        below = x_RWC[row + 2] if (row + 2) % height else zeros
        _combine_rows(above, x_RWC[row], x_RWC[row + 1], below, rows_4WC)
        for i in range(4):
            for column in range(across):
                t, w = (tile_row - first) * across + column, 2 * column
                for c in range(channels):
                    left, a, b, right = rows_4WC[i, w, c], rows_4WC[i, w + 1, c], rows_4WC[i, w + 2, c], rows_4WC[i, w + 3, c]
                    tiles_STC[4 * i, t, c] = left - b
                    tiles_STC[4 * i + 1, t, c] = a + b
                    tiles_STC[4 * i + 2, t, c] = b - a
                    tiles_STC[4 * i + 3, t, c] = a - right


@njit(nogil=True, cache=True)
def _combine_rows(above, a, b, below, rows_4WC):  # type: ignore[no-untyped-def]
    """B^T d of four rows of an image, for all tiles in them."""
    for w in range(a.shape[0]):
        for c in range(a.shape[1]):
            rows_4WC[0, w + 1, c] = above[w, c] - b[w, c]
            rows_4WC[1, w + 1, c] = a[w, c] + b[w, c]
            rows_4WC[2, w + 1, c] = b[w, c] - a[w, c]
            rows_4WC[3, w + 1, c] = a[w, c] - below[w, c]


@njit(nogil=True, cache=True)
def _transform_output(m_STK, bias_K, first, last, y_RWK):  # type: ignore[no-untyped-def]
    """Writes A^T m A plus the bias of the rows of tiles from first to last."""
    across = y_RWK.shape[1] // 2
    for tile_row in range(first, last):
        for column in range(across):
            t, row, w = (tile_row - first) * across + column, 2 * tile_row, 2 * column
            for k in range(len(bias_K)):
                top0 = m_STK[0, t, k] + m_STK[4, t, k] + m_STK[8, t, k]
                top1 = m_STK[1, t, k] + m_STK[5, t, k] + m_STK[9, t, k]
                top2 = m_STK[2, t, k] + m_STK[6, t, k] + m_STK[10, t, k]
                top3 = m_STK[3, t, k] + m_STK[7, t, k] + m_STK[11, t, k]
                low0 = m_STK[4, t, k] - m_STK[8, t, k] - m_STK[12, t, k]
                low1 = m_STK[5, t, k] - m_STK[9, t, k] - m_STK[13, t, k]
                low2 = m_STK[6, t, k] - m_STK[10, t, k] - m_STK[14, t, k]
                low3 = m_STK[7, t, k] - m_STK[11, t, k] - m_STK[15, t, k]
                y_RWK[row, w, k] = top0 + top1 + top2 + bias_K[k]
                y_RWK[row, w + 1, k] = top1 - top2 - top3 + bias_K[k]
                y_RWK[row + 1, w, k] = low0 + low1 + low2 + bias_K[k]
                y_RWK[row + 1, w + 1, k] = low1 - low2 - low3 + bias_K[k]
