"""What CompVis, LlamaGen and diffusers call the tensors of the same network.

Names of a `Tokenizer` are those of CompVis `VQModel`. LlamaGen's tokenizers are renames of it; diffusers' `VQModel`
also keeps the attention projections as matrices. Both list the decoder's levels from low to high resolution, CompVis
from high to low.
"""

import re
from collections.abc import Callable

FORMATS = ("compvis", "llamagen", "diffusers")
LEVEL = {
    "compvis": re.compile(r"encoder\.down\.(\d+)\."),
    "llamagen": re.compile(r"encoder\.conv_blocks\.(\d+)\."),
    "diffusers": re.compile(r"encoder\.down_blocks\.(\d+)\."),
}
LLAMAGEN_MIDDLE = {"block_1": "0", "attn_1": "1", "block_2": "2"}
DIFFUSERS_MIDDLE = {"block_1": "resnets.0", "attn_1": "attentions.0", "block_2": "resnets.1"}
DIFFUSERS_PARTS = {"block": "resnets", "attn": "attentions", "downsample": "downsamplers.0", "upsample": "upsamplers.0"}
DIFFUSERS_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
# Before version 0.17.
OLD_DIFFUSERS_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def detect_format(names: list[str]) -> str | None:
    """Which naming these tensors follow; None if none of the three."""
    return next((format for format, pattern in LEVEL.items() if any(map(pattern.match, names))), None)


def count_levels(names: list[str], format: str) -> int:
    """Number of resolutions of the encoder with these tensors."""
    return len({match[1] for name in names if (match := LEVEL[format].match(name))})


def renamer(format: str, num_levels: int) -> Callable[[str], str]:
    """The function from a CompVis name to the name in `format`, for a network of `num_levels` resolutions."""
    if format == "compvis":
        return str
    rename = _llamagen if format == "llamagen" else _diffusers
    return lambda name: rename(name, num_levels)


def current(name: str) -> str:
    """A tensor's name with what older versions of diffusers called the attention projections brought up to date."""
    return re.sub(r"(?<=\.)(query|key|value|proj_attn)(?=\.)", lambda match: OLD_DIFFUSERS_ATTENTION[match[1]], name)


def is_attention_matrix(name: str) -> bool:
    """Whether the tensor of this CompVis name, a 1x1 convolution (C, C, 1, 1), is a matrix (C, C) in diffusers."""
    return re.search(r"\.attn(_1|\.\d+)\.(q|k|v|proj_out)\.weight$", name) is not None


def _llamagen(name: str, num_levels: int) -> str:
    side, *parts = name.split(".")
    if parts[0] == "mid":
        return ".".join([side, "mid", LLAMAGEN_MIDDLE[parts[1]], *parts[2:]])
    if parts[0] not in ("down", "up"):
        return name
    level = _level(parts, num_levels)
    return ".".join([side, "conv_blocks", level, "res" if parts[2] == "block" else parts[2], *parts[3:]])


def _diffusers(name: str, num_levels: int) -> str:
    side, *parts = name.split(".")
    if side not in ("encoder", "decoder"):
        return name
    if parts[0] == "mid":
        head, kind, leaf = ["mid_block", DIFFUSERS_MIDDLE[parts[1]]], parts[1], parts[2:]
    elif parts[0] in ("down", "up"):
        indexed = parts[2] in ("block", "attn")
        head = [f"{parts[0]}_blocks", _level(parts, num_levels), DIFFUSERS_PARTS[parts[2]], *parts[3:4][:indexed]]
        kind, leaf = parts[2], parts[3 + indexed :]
    else:
        return name.replace("norm_out", "conv_norm_out")
    if kind.startswith("attn"):
        leaf = [DIFFUSERS_ATTENTION[leaf[0]], *leaf[1:]]
    return ".".join([side, *head, *leaf]).replace("nin_shortcut", "conv_shortcut")


def _level(parts: list[str], num_levels: int) -> str:
    return parts[1] if parts[0] == "down" else str(num_levels - 1 - int(parts[1]))
