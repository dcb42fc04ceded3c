"""The architecture of a tokenizer: what is stored with its tensors, and what a configuration asks for."""

from dataclasses import asdict, dataclass
from typing import Any

from stages.errors import ConfigError
from stages.first_stage.quantizers.shape import codebook_shape
from stages.options import ImageOptions, TokenizerOptions

PUBLISHED_NORM_GROUPS = 32
CHANNELS_PER_GROUP = 4  # at full resolution, as published models have 128 channels there
# Fields that came after the first fingerprints count only where they differ, so that what was there keeps its own.
LATER_FIELDS: dict[str, Any] = {"middle_attention": True, "fsq_levels": (), "num_norm_groups": PUBLISHED_NORM_GROUPS}


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """Architecture of a tokenizer; with the tensors it determines the fingerprint.

    `quantizer` is a name in `QUANTIZERS`. Saving bakes those that only differ in training from "vq" (nearest entry,
    Euclidean) into one: "vq-l2", "vq-ema" and "simvq" are stored as "vq" with the codebook the decoder sees.
    `middle_attention` is off in some published models. A stored configuration without `num_norm_groups` has 32.
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
    num_norm_groups: int = PUBLISHED_NORM_GROUPS

    def identity(self) -> dict[str, Any]:
        """What is stored and hashed."""
        values = asdict(self).items()
        return {name: value for name, value in values if name not in LATER_FIELDS or value != LATER_FIELDS[name]}

    @property
    def downsample(self) -> int:
        """Pixels per code along one side."""
        return 2 ** (len(self.channel_multipliers) - 1)


def tokenizer_config(options: TokenizerOptions, images: ImageOptions) -> TokenizerConfig:
    """The architecture asked for by a configuration.

    Raises:
        ConfigError: the image cannot be halved that often, a width does not fit the normalisation groups, or size and width
            of the codebook contradict each other or the quantizer.
    """
    num_groups = num_norm_groups(options)
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
        num_norm_groups=num_groups,
    )


def num_norm_groups(options: TokenizerOptions) -> int:
    """Groups of channels in every norm.

    Four channels to a group and at most as many groups as published models have, unless told otherwise. A network whose norms treat
    every channel by itself learns to blow up single places, by which it carries magnitudes past the norm: the droplets of Karras et
    al. 2020 (StyleGAN2, section 2).

    Raises:
        ConfigError: the channels at full resolution cannot be shared out evenly.
    """
    base, asked = options.base_channels, options.num_norm_groups
    divisor = asked or (CHANNELS_PER_GROUP if base <= CHANNELS_PER_GROUP * PUBLISHED_NORM_GROUPS else PUBLISHED_NORM_GROUPS)
    if base % divisor:
        rule = f"tokenizer.num_norm_groups, {asked}" if asked else f"{divisor} unless tokenizer.num_norm_groups is given"
        raise ConfigError(
            f"tokenizer.base_channels is {base}, but it must be a multiple of {rule}. Use {-(-base // divisor) * divisor}."
        )
    return asked or min(base // CHANNELS_PER_GROUP, PUBLISHED_NORM_GROUPS)


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
