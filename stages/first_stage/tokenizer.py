"""The tokenizer: images to codes and back."""

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stages.errors import ConfigError
from stages.first_stage.blocks import NUM_GROUPS, Decoder, Encoder
from stages.first_stage.quantizers import Quantized, build_quantizer
from stages.first_stage.quantizers.shape import codebook_shape
from stages.options import ImageOptions, TokenizerOptions

# Fields that came after the first fingerprints count only where they differ, so that what was there keeps its own.
LATER_FIELDS: dict[str, Any] = {"middle_attention": True, "fsq_levels": ()}


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """Architecture of a tokenizer; with the tensors it determines the fingerprint.

    `quantizer` is a name in `QUANTIZERS`. Saving bakes those that only differ in training from "vq" (nearest entry,
    Euclidean) into one: "vq-l2", "vq-ema" and "simvq" are stored as "vq" with the codebook the decoder sees.
    `middle_attention` is off in some published models.
    """

    resolution: int
    in_channels: int
    codebook_size: int
    codebook_dim: int
    base_channels: int
    channel_multipliers: tuple[int, ...]
    num_res_blocks: int
    attention_resolutions: tuple[int, ...]
    z_channels: int
    quantizer: str = "vq"
    dropout: float = 0.0
    middle_attention: bool = True
    fsq_levels: tuple[int, ...] = ()

    def identity(self) -> dict[str, Any]:
        """What is stored and hashed."""
        values = asdict(self).items()
        return {name: value for name, value in values if name not in LATER_FIELDS or value != LATER_FIELDS[name]}

    @property
    def downsample(self) -> int:
        """Pixels per code along one side."""
        return 2 ** (len(self.channel_multipliers) - 1)


class Tokenizer(nn.Module):
    """VQGAN without its losses. State-dict keys are those of CompVis `VQModel`.

    Attributes:
        config: the architecture.
        fingerprint: sha-256 of tensors and configuration; set on tokenizers loaded from an artefact, else "".
    """

    def __init__(self, config: TokenizerConfig):
        super().__init__()
        self.config = config
        self.fingerprint = ""
        common = dict(
            base_channels=config.base_channels,
            channel_multipliers=config.channel_multipliers,
            num_res_blocks=config.num_res_blocks,
            attention_resolutions=config.attention_resolutions,
            resolution=config.resolution,
            z_channels=config.z_channels,
            dropout=config.dropout,
            middle_attention=config.middle_attention,
        )
        self.encoder = Encoder(in_channels=config.in_channels, **common)  # type: ignore[arg-type]
        self.decoder = Decoder(out_channels=config.in_channels, **common)  # type: ignore[arg-type]
        self.quantize = build_quantizer(
            config.quantizer, config.codebook_size, config.codebook_dim, config.fsq_levels
        )
        self.quant_conv = nn.Conv2d(config.z_channels, config.codebook_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.codebook_dim, config.z_channels, 1)

    @property
    def codebook_size(self) -> int:
        return self.config.codebook_size

    @property
    def downsample(self) -> int:
        return self.config.downsample

    def grid(self, size: int) -> tuple[int, int]:
        """Rows and columns of codes of a square image of `size` pixels."""
        return size // self.downsample, size // self.downsample

    def encode(self, images_BCHW: Tensor) -> Tensor:
        """Codes of float images in [-1, 1], int64 (B, h * w), row by row."""
        return self.quantize.encode(self.quant_conv(self.encoder(images_BCHW))).flatten(1)

    def decode(self, codes_BHW: Tensor) -> Tensor:
        """Images (B, C, H, W) of int64 codes (B, h, w); around [-1, 1], not clamped."""
        # Entries looked up lie channels last, in which convolutions and norms on CPUs are further from the exact result.
        entries_BDHW = self.quantize.decode(codes_BHW).contiguous()
        return self.decoder(self.post_quant_conv(entries_BDHW))

    def forward(self, images_BCHW: Tensor) -> tuple[Tensor, Quantized]:
        """Reconstructions and what the losses need."""
        quantized = self.quantize(self.quant_conv(self.encoder(images_BCHW)))
        return self.decoder(self.post_quant_conv(quantized.z_BDHW)), quantized

    @torch.no_grad()
    def baked(self) -> "Tokenizer":
        """This tokenizer as it is stored: without what only training needs, its quantizer of the simplest kind."""
        kind, tensors = self.quantize.stored()
        copy = Tokenizer(replace(self.config, quantizer=kind, dropout=0.0)).to(self.quant_conv.weight.device)
        others = {name: tensor for name, tensor in self.state_dict().items() if not name.startswith("quantize.")}
        copy.load_state_dict({**others, **{f"quantize.{name}": tensor for name, tensor in tensors.items()}})
        return copy.eval()


def tokenizer_config(options: TokenizerOptions, images: ImageOptions) -> TokenizerConfig:
    """The architecture asked for by a configuration.

    Raises:
        ConfigError: the image cannot be halved that often, a width does not fit the normalisation groups, or size and width
            of the codebook contradict each other or the quantizer.
    """
    if options.base_channels % NUM_GROUPS:
        raise ConfigError(
            f"tokenizer.base_channels is {options.base_channels}, but it must be a multiple of {NUM_GROUPS} (normalisation groups). "
            f"Use {-(-options.base_channels // NUM_GROUPS) * NUM_GROUPS}."
        )
    if not options.channel_multipliers:
        raise ConfigError("tokenizer.channel_multipliers is [], but a network has at least one level. Write e.g. [1, 2, 4].")
    factor = 2 ** (len(options.channel_multipliers) - 1)
    if images.size % factor:
        raise ConfigError(
            f"images.size is {images.size}, but it must be a multiple of {factor}, since tokenizer.channel_multipliers has "
            f"{len(options.channel_multipliers)} levels. Use {-(-images.size // factor) * factor}, or fewer levels."
        )
    codebook_size, codebook_dim = codebook_shape(options)
    return TokenizerConfig(
        resolution=images.size,
        in_channels=num_channels(options, images),
        codebook_size=codebook_size,
        codebook_dim=codebook_dim,
        base_channels=options.base_channels,
        channel_multipliers=options.channel_multipliers,
        num_res_blocks=options.num_res_blocks,
        attention_resolutions=options.attention_resolutions,
        z_channels=options.z_channels,
        quantizer=options.quantizer,
        dropout=options.dropout,
        fsq_levels=options.fsq_levels,
    )


def num_channels(options: TokenizerOptions, images: ImageOptions) -> int:
    """Channels of what is tokenized: of the images, one per label of a map of ids, or one of a map of numbers.

    Raises:
        ConfigError: labels are given, but images are tokenized.
    """
    if options.input == "image":
        if options.num_labels is not None:
            raise ConfigError(
                f"tokenizer.num_labels is {options.num_labels}, but tokenizer.input is image. Name the map of labels, e.g. "
                f"tokenizer.input=segmentation, or leave num_labels out."
            )
        return images.channels
    return options.num_labels or 1


def psnr(images: Tensor, reconstructions: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB per image, of uint8 tensors (B, H, W, C)."""
    mse = F.mse_loss(images.float(), reconstructions.float(), reduction="none").flatten(1).mean(1)
    return 10.0 * torch.log10(255.0**2 / mse.clamp_min(1e-10))
