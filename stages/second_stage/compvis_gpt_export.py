"""The way back to CompVis' `GPT`: a transformer as `Net2NetTransformer` stores it, with the project file that describes it.

The original has one vocabulary for codes and conditions. Only models whose conditions are still the vectors of codes can be said in
it, as those that were imported are until they are trained on. A start token can be anything.
"""

import logging
from typing import Any

import torch
from torch import Tensor

from stages.compvis_project import NO_CONDITION
from stages.errors import ConfigError
from stages.second_stage.compvis_gpt import DROPOUTS, FIXED, names
from stages.second_stage.foreign_transformer import Export, check_buildable, give_named
from stages.second_stage.transformer import TransformerConfig

logger = logging.getLogger(__name__)

GPT = "taming.modules.transformer.mingpt.GPT"
NET2NET = "taming.models.cond_transformer.Net2NetTransformer"
LABELATOR = "taming.modules.util.Labelator"
# What a model has, by the parameters of the original.
SIZES = {"vocab_size": "codebook_size", "n_layer": "num_layers", "n_embd": "hidden_size", "n_head": "num_heads"}


def write(config: TransformerConfig, weights: dict[str, Tensor]) -> Export:
    """The way back of `read`: tensors as `Net2NetTransformer` names them, and the project file.

    The null condition is left out, as the original has none.

    Raises:
        ConfigError: a transformer that CompVis' code does not build; it names the option.
    """
    check_buildable(config, FIXED | {"ffn_size": 4 * config.hidden_size}, "CompVis' GPT")
    if config.conditioning not in ("none", "class", "codes"):
        raise ConfigError(
            f"conditioning.name is {config.conditioning}, but CompVis' GPT has none, class and codes. Use the command export, which "
            "writes every transformer under the names it has here."
        )
    tensors = give_named(weights, names(config.num_layers))
    positions = weights["position_embedding.weight"].to(torch.float32)
    given: dict[str, Any] = {}
    if config.conditioning == "none":
        given["sos_token"], positions = _start(weights, positions)
    else:
        _check_rows(config, weights)
    if config.conditioning == "codes":  # of 256 + 256 positions the last is never reached; readers tell the condition's length by it
        positions = torch.cat([positions, torch.zeros_like(positions[:1])])
    tensors["pos_emb"] = positions[None]
    mask = torch.ones(len(positions), len(positions)).tril()[None, None]
    tensors |= {f"blocks.{layer}.attn.mask": mask for layer in range(config.num_layers)}
    state = {f"transformer.{name}": tensor.contiguous() for name, tensor in tensors.items()}
    return Export(content={"state_dict": state}, parameters=_project(config, len(positions), given))


def _start(weights: dict[str, Tensor], positions_TC: Tensor) -> tuple[int, Tensor]:
    """The code whose vector is the start token, and the positions.

    The original looks the start token up among the codes. Where it is none of them, as after training on, its difference from code 0
    goes to the first position, which nothing but the start token has.
    """
    codes, start = (weights[name].to(torch.float32) for name in ("code_embedding.weight", "conditioning.embedding.weight"))
    same = (codes == start).all(1).nonzero()
    if len(same):
        return int(same[0]), positions_TC
    logger.warning(
        "The start token is no vector of a code, as CompVis' GPT has it: its difference from code 0 is added to the first position. Logits "
        "are the same up to rounding, but importing the file gives back these two tensors only as their sum."
    )
    return 0, torch.cat([positions_TC[:1] + start - codes[:1], positions_TC[1:]])


def _check_rows(config: TransformerConfig, weights: dict[str, Tensor]) -> None:
    """Refuses conditions that are not looked up among the codes."""
    codes, rows = weights["code_embedding.weight"], weights["conditioning.embedding.weight"][: config.num_classes]
    if config.num_classes > len(codes):
        raise ConfigError(
            f"conditioning.name is {config.conditioning} with {config.num_classes} values, but CompVis' GPT looks them up among its "
            f"{len(codes)} codes. Use the command export, which writes every transformer under the names it has here."
        )
    num_moved = int((rows != codes[: len(rows)]).any(1).sum())
    if num_moved:
        raise ConfigError(
            f"conditioning.name is {config.conditioning} with {num_moved} of {len(rows)} vectors that are no longer those of codes, but "
            "CompVis' GPT looks conditions up among its codes. Use the command export, which writes every transformer under the names "
            "it has here."
        )


def _project(config: TransformerConfig, num_positions: int, given: dict[str, Any]) -> dict[str, Any]:
    """The project file, as far as the transformer tells it.

    Args:
        config: of the transformer.
        num_positions: of the file.
        given: other parameters of the model.
    """
    sizes = {theirs: getattr(config, ours) for theirs, ours in {**SIZES, **DROPOUTS}.items()}
    conditions: dict[str, Any] = {
        "none": NO_CONDITION,
        "class": {"target": LABELATOR, "params": {"n_classes": config.num_classes}},
        "codes": {"target": "taming.models.vqgan.VQModel", "params": {"n_embed": config.num_classes}},
    }
    params = {
        "transformer_config": {"target": GPT, "params": {**sizes, "block_size": num_positions}},
        "cond_stage_config": conditions[config.conditioning],
        **given,
    }
    return {"model": {"target": NET2NET, "params": params}}
