"""What a tokenizer sees of an example: its image, or one of its condition maps at the same resolution."""

import numpy as np

from pipeline.sources import Example
from pipeline.views import Crop, preprocessing_spec, render, render_map
from stages.errors import ConfigError
from stages.first_stage.tokenizer import Tokenizer, num_channels
from stages.options import ImageOptions, TokenizerOptions

IMAGE = "image"


def render_input(
    example: Example, crop: Crop, images: ImageOptions, tokenizer: TokenizerOptions, uri: str
) -> np.ndarray:
    """The crop of what `tokenizer.input` names, uint8 (size, size, C): of a map of labels the ids, of one of numbers 255 times them.

    Args:
        example: decoded.
        crop: of the image, and of its maps.
        images: size and channels.
        tokenizer: what is tokenized.
        uri: of the image, for messages.

    Raises:
        ConfigError: the example has no such map, or the map is not of the kind that `tokenizer.num_labels` says.
    """
    name = tokenizer.input
    if name == IMAGE:
        return render(example.image, crop, images)
    if name not in example.conditions:
        known = ", ".join([IMAGE, *example.conditions])
        raise ConfigError(f"tokenizer.input is {name}, but images of this source have {known}. Choose one of these.")
    values = example.conditions[name]
    if values.shape != example.image.shape[:2]:
        raise ConfigError(
            f"tokenizer.input is {name}, but the {name} of {uri} is of shape {values.shape} and its image of {example.image.shape[:2]}. "
            f"Give every image a map of its own size."
        )
    check_map(values, tokenizer, uri)
    return render_map(values, crop, (images.size, images.size))[..., None]


def check_map(values: np.ndarray, tokenizer: TokenizerOptions, uri: str) -> None:
    """Refuses a map of numbers where there should be one of labels, the other way round, and values out of range.

    Raises:
        ConfigError: naming the image.
    """
    name, num_labels, is_float = tokenizer.input, tokenizer.num_labels, values.dtype.kind == "f"
    if num_labels is None and not is_float:
        raise ConfigError(
            f"tokenizer.num_labels is not set, but tokenizer.input is {name}, a map of ids. Set it above the largest id."
        )
    if num_labels is not None and is_float:
        raise ConfigError(
            f"tokenizer.num_labels is {num_labels}, but tokenizer.input is {name}, a map of numbers. Leave it out."
        )
    if num_labels is None and not (values.min() >= 0 and values.max() <= 1):
        raise ConfigError(
            f"tokenizer.input is {name}, but that of {uri} has values from {values.min():.4g} to {values.max():.4g}, and a map of numbers "
            f"is in [0, 1]. Scale it in the source."
        )
    if num_labels is not None and values.min() < 0:
        raise ConfigError(
            f"tokenizer.input is {name}, but that of {uri} has the id {values.min()}, and ids count from 0. Give pixels without a "
            f"label an id of their own."
        )
    if num_labels is not None and values.max() >= num_labels:
        raise ConfigError(
            f"tokenizer.num_labels is {num_labels}, but the {name} of {uri} has the id {values.max()}. Use at least "
            f"{values.max() + 1}; or give pixels without a label the next free id, where that one stands for them."
        )


def input_channels(images: ImageOptions, tokenizer: TokenizerOptions) -> int:
    """Channels of `render_input`."""
    return images.channels if tokenizer.input == IMAGE else 1


def check_fit(tokenizer: Tokenizer, images: ImageOptions, options: TokenizerOptions) -> None:
    """Refuses inputs of another number of channels than a tokenizer takes, and sizes that are no multiple of its patches.

    Raises:
        ConfigError: naming the key.
    """
    channels, taken = num_channels(options, images), tokenizer.config.in_channels
    if channels != taken:
        key = "images.channels" if options.input == IMAGE else "tokenizer.num_labels (1 without labels)"
        raise ConfigError(f"{key} is {channels}, but the tokenizer in {options.path} takes {taken} channels. Use the same number.")
    if images.size % tokenizer.downsample:
        raise ConfigError(
            f"images.size is {images.size}, but the tokenizer's patches are {tokenizer.downsample} pixels wide. Use a multiple."
        )


def input_spec(images: ImageOptions, tokenizer: TokenizerOptions) -> dict[str, object]:
    """What happens before the tokenizer, as it enters the identity of a code dataset; maps are named, images are what is not."""
    spec = preprocessing_spec(images)
    if tokenizer.input == IMAGE:
        return spec
    return {**spec, "input": tokenizer.input, "num_labels": tokenizer.num_labels}
