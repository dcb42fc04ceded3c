"""From the named tensors of a checkpoint to the network they belong to."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from stages.errors import ArtefactError
from stages.first_stage.blocks import NUM_GROUPS
from stages.first_stage.names import is_attention_matrix
from stages.first_stage.tokenizer import Tokenizer, TokenizerConfig

PUBLISHED_RESOLUTION = 256
MAX_NAMED = 5


def infer_config(
    tensors: dict[str, Tensor], rename: Callable[[str], str], marker: dict[str, Any], path: str
) -> TokenizerConfig:
    """The architecture of an autoencoder, read off the shapes of its tensors.

    Args:
        tensors: by their names in the file.
        rename: from CompVis names to those.
        marker: what an export wrote beside the tensors: `resolution` and `attention_resolutions`, or nothing.
        path: the file, for messages.

    Raises:
        ArtefactError: a tensor that the shape follows from is missing or cannot be one of a VQGAN.
    """

    def shape(name: str, rank: int) -> tuple[int, ...]:
        tensor = tensors.get(rename(name))
        if tensor is None or tensor.dim() != rank or not tensor.numel():
            state = "no" if tensor is None else f"a {tuple(tensor.shape)}"
            raise ArtefactError(
                f"{path} has {state} {rename(name)}, but a VQGAN needs one of {rank} dimensions. Check the file."
            )
        return tuple(tensor.shape)

    base, in_channels = shape("encoder.conv_in.weight", 4)[:2]
    num_levels = 0
    while rename(f"encoder.down.{num_levels}.block.0.conv1.weight") in tensors:
        num_levels += 1
    num_blocks = 0
    while rename(f"encoder.down.0.block.{num_blocks}.conv1.weight") in tensors:
        num_blocks += 1
    widths = [shape(f"encoder.down.{i}.block.0.conv1.weight", 4)[0] for i in range(num_levels)]
    if not widths or base % NUM_GROUPS or any(width % base for width in widths):
        raise ArtefactError(
            f"{path} has widths {[base, *widths]}, but the first must be a multiple of {NUM_GROUPS} and divide the "
            "others. Choose the checkpoint of a convolutional VQGAN."
        )
    resolution = marker.get("resolution", PUBLISHED_RESOLUTION)
    attended = tuple(
        resolution >> i for i in range(num_levels) if rename(f"encoder.down.{i}.attn.0.q.weight") in tensors
    )
    codebook_size, codebook_dim = shape("quantize.embedding.weight", 2)
    return TokenizerConfig(
        resolution=resolution,
        in_channels=in_channels,
        codebook_size=codebook_size,
        codebook_dim=codebook_dim,
        base_channels=base,
        channel_multipliers=tuple(width // base for width in widths),
        num_res_blocks=num_blocks,
        attention_resolutions=tuple(marker.get("attention_resolutions", attended)),
        z_channels=shape("decoder.conv_in.weight", 4)[1],
    )


def build_tokenizer(
    config: TokenizerConfig, tensors: dict[str, Tensor], rename: Callable[[str], str], path: str
) -> Tokenizer:
    """The network with these tensors, all of them and no others, as float32 in eval mode.

    Raises:
        ArtefactError: tensors are missing, left over or of other shapes; it names them.
    """
    with torch.device("meta"):
        tokenizer = Tokenizer(config)
    expected = {rename(name): (name, tensor.shape) for name, tensor in tokenizer.state_dict().items()}
    for problem, names in (("lacks", expected.keys() - tensors), ("has the unknown", tensors.keys() - expected)):
        if names:
            raise ArtefactError(
                f"{path} {problem} {name_some(sorted(names))}, but a VQGAN of this shape has exactly {len(expected)} "
                "tensors. Check that the checkpoint is whole and of a model without additions."
            )
    state = {}
    for outside, (name, shape) in expected.items():
        tensor = tensors[outside]
        if is_attention_matrix(name) and tensor.dim() == 2:
            tensor = tensor[:, :, None, None]
        if tensor.shape != shape:
            raise ArtefactError(
                f"{path} has {outside} of shape {tuple(tensor.shape)}, but the other tensors ask for {tuple(shape)}. "
                "Check that the checkpoint is of a VQGAN and whole."
            )
        state[name] = tensor.to(torch.float32).contiguous()
    tokenizer.load_state_dict(state, assign=True)
    return tokenizer.eval().requires_grad_(False)


def name_some(names: Iterable[str]) -> str:
    """The first few of some names, and how many more there are."""
    listed = list(names)
    more = f" and {len(listed) - MAX_NAMED} more" if len(listed) > MAX_NAMED else ""
    return ", ".join(listed[:MAX_NAMED]) + more
