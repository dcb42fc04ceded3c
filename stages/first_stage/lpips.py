"""LPIPS with VGG16 (Zhang et al. 2018): the distance of two images in the features of a network that was trained to see.

There are no weights here and none are made up: the user names the file of a VGG16 and that of the published linear heads.
"""

import re
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stages.errors import ConfigError

# Positions of torchvision's vgg16().features: convolutions in five blocks, of which each ends in front of a pooling layer.
BLOCKS = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
WIDTHS = (64, 128, 256, 512, 512)
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # from [-1, 1] to what VGG16 was trained on
SMALLEST_IMAGE = 16  # pixels, of which the last block sees one
EPS = 1e-10  # added to the norm, not to its square
CONVOLUTION = re.compile(r"(?:.*\.)?(?:features|slice[1-5])\.(\d+)\.(weight|bias)")
HEAD = re.compile(r"(?:.*\.)?lin([0-4])\.model\.1\.weight")


class Lpips(nn.Module):
    """Distance per image, float32 (B,), of float images (B, 1 or 3, H, W) in [-1, 1].

    Frozen, and always in eval mode: `train()` of a module around it changes nothing, since there is no dropout in here that
    could be switched on (the original's heads have one, and it is active in training).

    Args:
        vgg: tensors of a VGG16, under torchvision's names or those of a CompVis checkpoint; others among them are ignored.
        heads: tensors of the linear heads; those in `vgg` if not given.

    Raises:
        ConfigError: a tensor is missing or has another shape.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, vgg: Mapping[str, Tensor], heads: Mapping[str, Tensor] | None = None):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleList(_frozen_convolution(vgg, position, _inputs(b, i), width) for i, position in enumerate(block))
            for b, (block, width) in enumerate(zip(BLOCKS, WIDTHS))
        )
        found = _matching(HEAD, heads if heads is not None else vgg)
        for i, width in enumerate(WIDTHS):
            head = found.get((str(i),))
            _check("perceptual_heads", f"lin{i}.model.1.weight", head, (1, width, 1, 1))
            self.register_buffer(f"head{i}", head.float().clone())  # type: ignore[union-attr]  # checked
        self.register_buffer("shift", torch.tensor(SHIFT)[None, :, None, None])
        self.register_buffer("scale", torch.tensor(SCALE)[None, :, None, None])
        self.requires_grad_(False)
        self.eval()

    def forward(self, images_BCHW: Tensor, reconstructions_BCHW: Tensor) -> Tensor:
        with torch.no_grad():
            expected = self._features(images_BCHW)
        found = self._features(reconstructions_BCHW)
        distance_B = torch.zeros(len(images_BCHW), device=images_BCHW.device)
        for i, (a, b) in enumerate(zip(expected, found)):
            with torch.autocast(a.device.type, enabled=False):
                difference = (_unit(a) - _unit(b)).square()
                head = getattr(self, f"head{i}")
                distance_B = distance_B + F.conv2d(difference, head).mean((1, 2, 3))
        return distance_B

    def _features(self, images_BCHW: Tensor) -> list[Tensor]:
        """Activations at the end of each block."""
        x = (images_BCHW - self.shift) / self.scale  # one channel becomes three
        features = []
        for i, block in enumerate(self.blocks):
            if i:
                x = F.max_pool2d(x, 2)
            for convolution in block.children():
                x = F.relu(convolution(x))
            features.append(x)
        return features


def _unit(features: Tensor) -> Tensor:
    """Features of unit length at every position, in float32."""
    features = features.float()
    return features / (features.square().sum(1, keepdim=True).sqrt() + EPS)


def _inputs(block: int, index: int) -> int:
    if index:
        return WIDTHS[block]
    return WIDTHS[block - 1] if block else 3


def _matching(pattern: re.Pattern, tensors: Mapping[str, Tensor]) -> dict[tuple[str, ...], Tensor]:
    matches = ((pattern.fullmatch(name), tensor) for name, tensor in tensors.items())
    return {match.groups(): tensor for match, tensor in matches if match}


def _frozen_convolution(vgg: Mapping[str, Tensor], position: int, inputs: int, width: int) -> nn.Conv2d:
    found = _matching(CONVOLUTION, vgg)
    weight, bias = found.get((str(position), "weight")), found.get((str(position), "bias"))
    _check("perceptual_vgg", f"features.{position}.weight", weight, (width, inputs, 3, 3))
    _check("perceptual_vgg", f"features.{position}.bias", bias, (width,))
    convolution = nn.Conv2d(inputs, width, 3, padding=1)
    convolution.load_state_dict({"weight": weight, "bias": bias})
    return convolution


def _check(key: str, name: str, tensor: Tensor | None, shape: tuple[int, ...]) -> None:
    if tensor is None or tuple(tensor.shape) != shape:
        what = "has no" if tensor is None else f"has a {tuple(tensor.shape)}"
        raise ConfigError(
            f"The file of tokenizer_train.{key} {what} {name}, but LPIPS needs one of {shape}. Name a file of VGG16 weights and "
            f"one of the heads that the lpips package brings (weights/v0.1/vgg.pth)."
        )
