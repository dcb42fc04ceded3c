"""Weights of LlamaGen's class-conditional GPT (Sun et al. 2024).

Blocks are like the default ones, without a norm of queries and keys. Rotations are the same, but pairs are neighbours there
and halves of a head here, so the rows of queries and keys change places.
"""

import math
from typing import Any

import torch
from torch import Tensor

from stages.errors import ArtefactError, ConfigError
from stages.first_stage.foreign import MARKER, Foreign
from stages.options import ConditioningOptions, ModelOptions
from stages.second_stage.foreign_transformer import (
    Description,
    Export,
    Names,
    Request,
    Taker,
    block_names,
    check_buildable,
    check_vocabulary,
    give_named,
    take_named,
)
from stages.second_stage.transformer import TransformerConfig

# Heads by (layers, width) of the published sizes: B, L, XL, XXL, 3B, 1B, 7B.
HEADS = {(12, 768): 12, (24, 1024): 16, (36, 1280): 20, (48, 1536): 24, (24, 3200): 32, (22, 2048): 32, (32, 4096): 32}
DROPOUT = 0.1
# What all its models have.
FIXED: dict[str, Any] = {
    "positions": "rope-zero-prefix",
    "qk_norm": False,
    "norm": "rms",
    "norm_eps": 1e-5,
    "ffn": "swiglu",
    "bias": False,
    "rope_base": 10_000.0,
}
WHOLE: Names = {
    "code_embedding.weight": ("tok_embeddings.weight",),
    "conditioning.embedding.weight": ("cls_embedding.embedding_table.weight",),
    "norm.weight": ("norm.weight",),
    "head.weight": ("output.weight",),
}
BLOCK: Names = {
    "attention_norm": ("attention_norm",),
    "attention.qkv": ("attention.wqkv",),
    "attention.out": ("attention.wo",),
    "ffn_norm": ("ffn_norm",),
    "ffn.gate_up": ("feed_forward.w1", "feed_forward.w3"),
    "ffn.down": ("feed_forward.w2",),
}
# Tables that follow from the sizes.
DERIVED = {"freqs_cis$": "the table of rotations", "causal_mask$": "the causal mask"}
NUM_HEADS = "num_heads"  # what an export says beside the tensors, which do not show it


def read(foreign: Foreign, request: Request) -> Description:
    """The transformer of a file.

    Raises:
        ArtefactError: not exactly such tensors, or of another codebook.
        ConfigError: a size that was not published, without num_heads, or another number of classes than is asked for.
    """
    _check_rotations(foreign, request.grid)
    take = Taker(foreign.without(DERIVED).checked())
    if foreign.has("cls_embedding.cap_proj"):
        raise ArtefactError(
            f"{foreign.path} is conditioned on text, but only class-conditional models are supported. Choose a c2i checkpoint."
        )
    codes = take("tok_embeddings.weight", 2)
    check_vocabulary(foreign.path, len(codes), request.codebook_size)
    num_layers, width = take.count_blocks("layers"), codes.shape[1]
    num_heads = _num_heads(foreign, request.num_heads, num_layers, width)
    weights = take_named(take, _names(num_layers))
    num_classes = _num_classes(foreign.path, len(weights["conditioning.embedding.weight"]), request.num_classes)
    take.finish()
    for name in _turned(num_layers):
        if weights[name].shape != (3 * width, width):
            raise ArtefactError(
                f"{foreign.path} has {_names(num_layers)[name][0]} of shape {tuple(weights[name].shape)}, but only models of one width "
                "with as many key as query heads are supported. Choose another checkpoint."
            )
        weights[name] = _swap(weights[name], (num_heads, -1, 2))
    model = ModelOptions(
        num_layers=num_layers,
        hidden_size=width,
        num_heads=num_heads,
        ffn_size=weights["blocks.0.ffn.down.weight"].shape[1],
        residual_dropout=DROPOUT,
        embedding_dropout=DROPOUT,
        **FIXED,
    )
    conditioning = ConditioningOptions(name="class")
    return Description(model=model, conditioning=conditioning, num_classes=num_classes, weights=weights)


def _check_rotations(foreign: Foreign, grid: tuple[int, int]) -> None:
    """Few files hold the table of rotations, a row for the class and one per code, which tells the grid."""
    table, num_codes = foreign.tensors.get("freqs_cis"), grid[0] * grid[1]
    if table is not None and table.dim() and len(table) != 1 + num_codes:
        raise ConfigError(
            f"--image-size makes {grid[0]} x {grid[1]} codes, but {foreign.path} has rotations of {len(table) - 1}. Name the size that the "
            f"transformer was trained on."
        )


def _num_classes(path: str, num_rows: int, asked: int | None) -> int:
    """Classes of a table whose last row is the null class."""
    if num_rows < 2:
        raise ArtefactError(
            f"{path} has a table of {num_rows} class, but it must hold one class and the null class at least. Check that the file is whole."
        )
    if asked not in (None, num_rows - 1):
        raise ConfigError(
            f"--num-classes is {asked}, but the tensors of {path} have {num_rows - 1} classes and the null class. Leave it out."
        )
    return num_rows - 1


def _num_heads(foreign: Foreign, asked: int | None, num_layers: int, width: int) -> int:
    exported = foreign.marker.get(NUM_HEADS)
    if exported is not None and asked not in (None, exported):
        raise ConfigError(f"--num-heads is {asked}, but {foreign.path} was exported with {exported}. Leave it out.")
    found = next((n for n in (asked, exported, HEADS.get((num_layers, width))) if n is not None), None)
    if type(found) is not int or found < 1 or width % (4 * found):
        raise ConfigError(
            f"--num-heads is {found}, but a transformer of {num_layers} layers and width {width} needs a number of heads that "
            "divides its width into multiples of 4. Name it as it was trained."
        )
    return found


def _names(num_layers: int) -> Names:
    return WHOLE | block_names(BLOCK, num_layers, "layers", ("weight",))


def _turned(num_layers: int) -> list[str]:
    """The weights whose queries and keys are rotated."""
    return [f"blocks.{layer}.attention.qkv.weight" for layer in range(num_layers)]


def _swap(qkv: Tensor, heads: tuple[int, int, int]) -> Tensor:
    """Rows of queries and keys in another order, (3 C, C).

    Args:
        qkv: queries, keys and values.
        heads: how the rows of either are arranged. From (H, -1, 2), neighbouring pairs (x0, y0, x1, y1, ...), they become halves
            (x0, x1, ..., y0, y1, ...) of each head, and from (H, 2, -1) pairs again.
    """
    q, k, v = qkv.chunk(3)
    q, k = (rows.view(*heads, rows.shape[1]).transpose(1, 2).reshape(rows.shape) for rows in (q, k))
    return torch.cat([q, k, v])


def write(config: TransformerConfig, weights: dict[str, Tensor]) -> Export:
    """The way back of `read`.

    Raises:
        ConfigError: a transformer that LlamaGen's code does not build; it names the option.
    """
    check_buildable(config, FIXED, "LlamaGen's GPT")
    if config.conditioning != "class":
        raise ConfigError(
            f"conditioning.name is {config.conditioning}, but LlamaGen's GPT is conditioned on classes. Use the command export, which "
            "writes every transformer under the names it has here."
        )
    if config.grid[0] != config.grid[1]:
        raise ConfigError(
            f"The grid of codes is {config.grid[0]} x {config.grid[1]}, but LlamaGen's GPT has square ones. Use the command export, "
            "which writes every transformer under the names it has here."
        )
    swapped = {name: _swap(weights[name], (config.num_heads, 2, -1)) for name in _turned(config.num_layers)}
    tensors = give_named(weights | swapped, _names(config.num_layers))
    parameters = {
        "dim": config.hidden_size,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "vocab_size": config.codebook_size,
        "num_classes": config.num_classes,
        "block_size": config.num_codes,
        "cls_token_num": 1,
        "model_type": "c2i",
        **_ffn_parameters(config),
    }
    return Export(content={"model": tensors, MARKER: {NUM_HEADS: config.num_heads}}, parameters=parameters)


def _ffn_parameters(config: TransformerConfig) -> dict[str, Any]:
    """LlamaGen multiplies 8/3 of its width, cut to a whole number, and rounds up to a multiple, of 256 in its published models."""
    usual = int(8 * config.hidden_size / 3)
    for multiple in (256, 128, 64, 32, 16, 8, 4, 2, 1):
        if math.ceil(usual / multiple) * multiple == config.ffn_size:
            return {"multiple_of": multiple}
    # Half a unit more than needed: the product is cut to a whole number, and must not fall below it by rounding.
    return {"multiple_of": 1, "ffn_dim_multiplier": (config.ffn_size + 0.5) / usual}
