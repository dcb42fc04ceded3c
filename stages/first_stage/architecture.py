"""From the named tensors of a checkpoint to the network they belong to."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from stages.compvis_project import Target, number
from stages.errors import ArtefactError, ConfigError
from stages.first_stage.foreign import Foreign, name_some
from stages.first_stage.names import is_attention_matrix
from stages.first_stage.tokenizer import Tokenizer
from stages.first_stage.tokenizer_config import PUBLISHED_NORM_GROUPS, TokenizerConfig

PUBLISHED_RESOLUTION = 256
GUMBEL = "quantize.proj.weight"  # only CompVis' `GumbelVQ` has it
# Parameters of a project's autoencoder, by where they stand there and what they are here.
DESCRIBED = {
    "ddconfig.ch": "base_channels",
    "ddconfig.ch_mult": "channel_multipliers",
    "ddconfig.num_res_blocks": "num_res_blocks",
    "ddconfig.attn_resolutions": "attention_resolutions",
    "ddconfig.z_channels": "z_channels",
    "ddconfig.in_channels": "in_channels",
    "ddconfig.out_ch": "in_channels",
    "n_embed": "codebook_size",
    "embed_dim": "codebook_dim",
}


def infer_config(foreign: Foreign, rename: Callable[[str], str], described: Target | None = None) -> TokenizerConfig:
    """The architecture of an autoencoder, read off the shapes of its tensors.

    Args:
        foreign: the tensors of the autoencoder alone, and what an export wrote beside them: `resolution`, `num_norm_groups` and
            `attention_resolutions`, or nothing.
        rename: from CompVis names to those of the file.
        described: the autoencoder in its project file, for the resolution.

    Raises:
        ArtefactError: a tensor that the shape follows from is missing or cannot be one of a VQGAN.
    """

    tensors, marker, path = foreign.tensors, foreign.marker, foreign.path

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
    num_groups = marker.get("num_norm_groups", PUBLISHED_NORM_GROUPS)
    if not widths or any(width % base for width in widths):
        raise ArtefactError(
            f"{path} has widths {[base, *widths]}, but the first must divide the others. Choose the checkpoint of a convolutional VQGAN."
        )
    if base % num_groups:
        raise ArtefactError(
            f"{path} has {base} channels at full resolution, but its norms' {num_groups} groups must divide them. Choose the checkpoint of "
            f"a convolutional VQGAN, and check norm_num_groups in a config.json beside it."
        )
    described_resolution = _described_resolution(described, path) if described is not None else None
    resolution = marker.get("resolution", described_resolution or PUBLISHED_RESOLUTION)
    attended = tuple(
        resolution >> i for i in range(num_levels) if rename(f"encoder.down.{i}.attn.0.q.weight") in tensors
    )
    is_gumbel = GUMBEL in tensors
    codebook_size, codebook_dim = shape("quantize.embed.weight" if is_gumbel else "quantize.embedding.weight", 2)
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
        quantizer="gumbel" if is_gumbel else "vq",
        num_norm_groups=num_groups,
        middle_attention=rename("encoder.mid.attn_1.q.weight") in tensors,
    )


def check_described(config: TokenizerConfig, described: Target, project_path: str, path: str) -> None:
    """Refuses a project file that does not describe the autoencoder of the tensors.

    Raises:
        ConfigError: naming the first value that differs, on both sides.
    """
    if _parameter(described, "ddconfig.double_z"):
        raise ConfigError(
            f"ddconfig.double_z in {project_path} is True, but a VQGAN has no variances. Choose another model."
        )
    for key, name in DESCRIBED.items():
        there, here = _parameter(described, key), getattr(config, name)
        if isinstance(there, list):
            there = tuple(there)
        if name == "attention_resolutions" and there is not None:
            sides = [config.resolution >> level for level in range(len(config.channel_multipliers))]
            there = tuple(side for side in sides if side in there)
        if there is not None and there != here:
            raise ConfigError(
                f"{key} in {project_path} is {there}, but the tensors of {path} give {here}. Name the project file that came "
                "with this checkpoint."
            )


def _described_resolution(described: Target, path: str) -> int | None:
    ddconfig = described.params.get("ddconfig")
    return number(Target("ddconfig", ddconfig), "resolution", f"the project file of {path}") if isinstance(ddconfig, dict) else None


def _parameter(described: Target, key: str) -> Any:
    value: Any = described.params
    for name in key.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


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
