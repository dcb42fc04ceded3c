"""Patch discriminator (Isola et al. 2017) with group instead of batch normalisation.

Batch statistics would be contaminated by the generator's pass and differ between ranks; groups depend on one image only.
"""

from torch import Tensor, nn

from stages.errors import ConfigError
from stages.first_stage.blocks import Norm
from stages.options import TokenizerTrainOptions

GROUPS, EPS = 8, 1e-5


class PatchDiscriminator(nn.Module):
    """Images (B, C, H, W) in [-1, 1] to one real/fake logit per patch (B, 1, H', W')."""

    def __init__(self, in_channels: int, channels: int, num_layers: int):
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(in_channels, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        width = channels
        for i in range(1, num_layers + 1):
            wider = channels * min(2**i, 8)
            stride = 2 if i < num_layers else 1
            layers += [
                nn.Conv2d(width, wider, 4, stride=stride, padding=1, bias=False),
                Norm(wider, GROUPS, EPS),
                nn.LeakyReLU(0.2),
            ]
            width = wider
        layers.append(nn.Conv2d(width, 1, 4, stride=1, padding=1))
        self.main = nn.Sequential(*layers)
        for module in self.main:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return self.main(images_BCHW)


def smallest_image(num_layers: int) -> int:
    """Side of the smallest image that leaves at least one patch."""
    side = 1
    for stride in [1, 1] + [2] * num_layers:
        side = (side - 1) * stride + 4 - 2
    return side


def build_discriminator(options: TokenizerTrainOptions, in_channels: int, size: int) -> PatchDiscriminator | None:
    """The discriminator asked for, or None when its weight is 0.

    Raises:
        ConfigError: the image is too small to leave one patch, or a width does not fit the normalisation groups.
    """
    if options.discriminator_weight == 0:
        return None
    channels, unit = options.discriminator_channels, GROUPS // 2  # the first layer that is normalised has twice as many
    if channels % unit:
        raise ConfigError(
            f"tokenizer_train.discriminator_channels is {channels}, but it must be a multiple of {unit} "
            f"(normalisation groups). Use {channels // unit * unit}."
        )
    needed = smallest_image(options.discriminator_layers)
    if size < needed:
        raise ConfigError(
            f"tokenizer_train.discriminator_layers is {options.discriminator_layers}, but that needs images of at least {needed} "
            f"pixels and images.size is {size}. Use fewer layers."
        )
    return PatchDiscriminator(in_channels, options.discriminator_channels, options.discriminator_layers)
