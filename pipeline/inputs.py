"""What a tokenizer sees of an example: its image, or one of its condition maps at the same resolution."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from pipeline.sources import Example, Source
from pipeline.sources.contract import IMAGE
from pipeline.views import Crop, preprocessing_spec, render, render_map
from stages.errors import BadImage, ConfigError
from stages.first_stage.tokenizer_config import TokenizerConfig, num_channels
from stages.options import ImageOptions, TokenizerOptions

NUM_TRIED = 100  # images that are tried for one that can be decoded


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
        BadImage: the example has no such map (no-condition).
        ConfigError: the map is not of the kind that `tokenizer.num_labels` says.
    """
    name = tokenizer.input
    if name == IMAGE:
        return render(example.image, crop, images)
    _check_has(example, name)
    values = example.conditions[name]
    if values.shape != example.image.shape[:2]:
        raise ConfigError(
            f"tokenizer.input is {name}, but the {name} of {uri} is of shape {values.shape} and its image of {example.image.shape[:2]}. "
            f"Give every image a map of its own size."
        )
    check_map(values, tokenizer, uri)
    return render_map(values, crop, (images.size, images.size))[..., None]


def render_views(
    example: Example, crops: Sequence[Crop], images: ImageOptions, tokenizer: TokenizerOptions, uri: str
) -> np.ndarray:
    """`render_input` of several crops, uint8 (V, size, size, C), of an image of a source that `check_maps` has passed.

    Raises:
        BadImage: this image has no such map, or one that does not fit (no-condition, unfit-map).
    """
    try:
        return np.stack([render_input(example, crop, images, tokenizer, uri) for crop in crops])
    except ConfigError as error:  # the options were checked on another image, so it is this one that is different
        raise BadImage("unfit-map", str(error)) from error


def render_stored(example: Example, name: str, crops: Sequence[Crop], grid: tuple[int, int]) -> np.ndarray:
    """A map as it is stored beside codes, uint8 (V, h, w): one value per cell of the (h, w) grid, of several crops.

    Raises:
        BadImage: the image has no such map, or one that does not fit in a byte (no-condition, unfit-map).
    """
    _check_has(example, name)
    try:
        return np.stack([render_map(example.conditions[name], crop, grid) for crop in crops])
    except ValueError as error:
        raise BadImage("unfit-map", f"{name}: {error}") from error


def _check_has(example: Example, name: str) -> None:
    if name not in example.conditions:
        raise BadImage("no-condition", f"the image has no {name}")


def needed_maps(tokenizer: TokenizerOptions, stored: Sequence[str] = ()) -> list[str]:
    """Names of the maps that a job needs: those it stores, and the one that is tokenized."""
    return [*stored] if tokenizer.input == IMAGE else [*stored, tokenizer.input]


def check_maps(source: Source, uris: pa.ChunkedArray, tokenizer: TokenizerOptions, stored: Sequence[str] = ()) -> None:
    """Refuses condition maps that a source does not have, and one to tokenize that is of another kind than the tokenizer takes.

    The first image that can be decoded and has all of them tells.

    Args:
        source: of the images.
        uris: string, of all images.
        tokenizer: what is tokenized.
        stored: names of further maps, `codes.conditions`.

    Raises:
        ConfigError: naming what there is.
    """
    wanted = needed_maps(tokenizer, stored)
    if not wanted:
        return
    maps: list[str] = []
    fault = ""
    for uri in uris.slice(0, NUM_TRIED).to_pylist():
        try:
            example = source.decode(source.fetch(uri))
        except (BadImage, FileNotFoundError) as error:
            fault = f" The last image that was tried is {uri}: {error.message if isinstance(error, BadImage) else error}."
            continue
        found = [name for name, values in example.conditions.items() if values.shape == example.image.shape[:2]]
        maps = list(dict.fromkeys([*maps, *found]))
        if set(wanted) <= set(found):
            if tokenizer.input != IMAGE:
                check_map(example.conditions[tokenizer.input], tokenizer, uri)
            _check_stored(example, stored, uri)
            return
    for name in wanted:
        if name not in maps:
            given = f"codes.conditions is {list(stored)}" if name in stored else f"tokenizer.input is {name}"
            raise ConfigError(
                f"{given}, but {name} is no map of this source's images, which have: {', '.join(maps) or 'none'}. Choose from these."
                f"{fault}"
            )


def _check_stored(example: Example, stored: Sequence[str], uri: str) -> None:
    h, w = example.image.shape[:2]
    for name in stored:
        try:
            render_stored(example, name, [Crop(0, 0, w, h, is_flipped=False)], (1, 1))
        except BadImage as error:
            raise ConfigError(f"codes.conditions names {name}, but that of {uri} does not fit: {error.message}. Leave it out.") from error


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
            f"tokenizer.input is {name}, but that of {uri} has values from {values.min():.9g} to {values.max():.9g}, and a map of numbers "
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


def check_fit(tokenizer: TokenizerConfig, images: ImageOptions, options: TokenizerOptions) -> None:
    """Refuses inputs of another number of channels than a tokenizer takes, and sizes that are no multiple of its patches.

    Raises:
        ConfigError: naming the key.
    """
    channels, taken = num_channels(options, images), tokenizer.in_channels
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
