"""The Inception-v3 of FID: the network of TensorFlow's `inception-2015-12-05` graph, in PyTorch.

It differs from other Inception-v3 networks (Szegedy et al. 2015): average pooling leaves the padding out, the last block
pools by maximum, and there are 1008 classes. Parameters are named as in the weights that pytorch-fid and torch-fidelity
converted, so that these load as they are.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIDE = 299
NUM_CLASSES = 1008
NUM_SPATIAL_CHANNELS = 7  # sFID: what is kept of the 17 x 17 map (Nash et al. 2021; as in openai/guided-diffusion)

Kernel = int | tuple[int, int]
# A convolution: output channels and kernel. Two kernels are two convolutions side by side.
Conv = tuple[int, Kernel | list[Kernel]]


class ConvNorm(nn.Module):
    """Convolution, normalisation, ReLU. A stride of 1 keeps the size if `is_padded`; a stride of 2 never pads."""

    def __init__(self, in_channels: int, out_channels: int, kernel: Kernel, stride: int = 1, is_padded: bool = True):
        super().__init__()
        height, width = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (height // 2, width // 2) if is_padded and stride == 1 else 0
        self.conv = nn.Conv2d(in_channels, out_channels, (height, width), stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out_channels, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class Mixed(nn.Module):
    """Branches over the same input, concatenated: chains of convolutions, and last a pooled one.

    Args:
        in_channels: of the input.
        branches: chains by name; their convolutions are called NAME, or NAME_1, NAME_2 … if there are several.
        pool_channels: of the convolution after the pooling; 0: no convolution, and everything is halved in size.
        pool: "avg" or "max".
    """

    def __init__(self, in_channels: int, branches: dict[str, list[Conv]], pool_channels: int = 0, pool: str = "avg"):
        super().__init__()
        self.branches = [self._add_chain(name, in_channels, chain, not pool_channels) for name, chain in branches.items()]
        self.pool = pool
        self.is_halving = not pool_channels
        if pool_channels:
            self.branch_pool = ConvNorm(in_channels, pool_channels, 1)

    def _add_chain(self, name: str, channels: int, chain: list[Conv], is_halving: bool) -> list[list[str]]:
        """Adds the modules of a chain and returns their names, step by step."""
        steps = []
        for i, (out_channels, kernels) in enumerate(chain, start=1):
            stride = 2 if is_halving and i == len(chain) else 1
            step = name if len(chain) == 1 else f"{name}_{i}"
            if isinstance(kernels, list):
                modules = {f"{step}{letter}": kernel for letter, kernel in zip("ab", kernels, strict=True)}
            else:
                modules = {step: kernels}
            for key, kernel in modules.items():
                self.add_module(key, ConvNorm(channels, out_channels, kernel, stride))
            steps.append(list(modules))
            channels = out_channels
        return steps

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for steps in self.branches:
            y = x
            for names in steps:
                y = torch.cat([self.get_submodule(name)(y) for name in names], dim=1)
            outputs.append(y)
        return torch.cat([*outputs, self._pooled(x)], dim=1)

    def _pooled(self, x: Tensor) -> Tensor:
        if self.is_halving:
            return F.max_pool2d(x, 3, stride=2)
        if self.pool == "max":
            return self.branch_pool(F.max_pool2d(x, 3, stride=1, padding=1))
        return self.branch_pool(F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False))


def _mixed_35(in_channels: int, pool_channels: int) -> Mixed:
    branches: dict[str, list[Conv]] = {
        "branch1x1": [(64, 1)],
        "branch5x5": [(48, 1), (64, 5)],
        "branch3x3dbl": [(64, 1), (96, 3), (96, 3)],
    }
    return Mixed(in_channels, branches, pool_channels)


def _mixed_17(c: int) -> Mixed:
    row, column = (1, 7), (7, 1)
    branches: dict[str, list[Conv]] = {
        "branch1x1": [(192, 1)],
        "branch7x7": [(c, 1), (c, row), (192, column)],
        "branch7x7dbl": [(c, 1), (c, column), (c, row), (c, column), (192, row)],
    }
    return Mixed(768, branches, 192)


def _mixed_8(in_channels: int, pool: str) -> Mixed:
    both: list[Kernel] = [(1, 3), (3, 1)]
    branches: dict[str, list[Conv]] = {
        "branch1x1": [(320, 1)],
        "branch3x3": [(384, 1), (384, both)],
        "branch3x3dbl": [(448, 1), (384, 3), (384, both)],
    }
    return Mixed(in_channels, branches, 192, pool)


class FidInception(nn.Module):
    """Images float (n, 3, 299, 299) in [-1, 1) to what the metrics of this network are made from. Use in eval mode.

    Args:
        has_classes: whether there is a last layer, from features to logits.
    """

    def __init__(self, has_classes: bool = True) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = ConvNorm(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = ConvNorm(32, 32, 3, is_padded=False)
        self.Conv2d_2b_3x3 = ConvNorm(32, 64, 3)
        self.Conv2d_3b_1x1 = ConvNorm(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvNorm(80, 192, 3, is_padded=False)
        self.Mixed_5b = _mixed_35(192, 32)
        self.Mixed_5c = _mixed_35(256, 64)
        self.Mixed_5d = _mixed_35(288, 64)
        self.Mixed_6a = Mixed(288, {"branch3x3": [(384, 3)], "branch3x3dbl": [(64, 1), (96, 3), (96, 3)]})
        self.Mixed_6b = _mixed_17(128)
        self.Mixed_6c = _mixed_17(160)
        self.Mixed_6d = _mixed_17(160)
        self.Mixed_6e = _mixed_17(192)
        self.Mixed_7a = Mixed(
            768, {"branch3x3": [(192, 1), (320, 3)], "branch7x7x3": [(192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3)]}
        )
        self.Mixed_7b = _mixed_8(1280, "avg")
        self.Mixed_7c = _mixed_8(2048, "max")
        self.fc = nn.Linear(2048, NUM_CLASSES) if has_classes else None

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """features (n, 2048): pool_3 of the graph. spatial (n, 2023): the first 7 channels of `mixed_6/conv`, row by row.
        logits (n, 1008), with `has_classes`: without the bias of the last layer, as the Inception Score is defined on this graph."""
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = F.max_pool2d(x, 3, stride=2)
        x = F.max_pool2d(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)), 3, stride=2)
        x = self.Mixed_6a(self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x))))
        x = self.Mixed_6c(self.Mixed_6b(x))
        spatial = self.Mixed_6d.get_submodule("branch1x1")(x)[:, :NUM_SPATIAL_CHANNELS]
        x = self.Mixed_7a(self.Mixed_6e(self.Mixed_6d(x)))
        features = self.Mixed_7c(self.Mixed_7b(x)).mean((2, 3))
        found = {"features": features, "spatial": spatial.permute(0, 2, 3, 1).flatten(1)}
        if self.fc is not None:
            found["logits"] = features @ self.fc.weight.T
        return found
