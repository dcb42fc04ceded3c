"""Weights of CompVis' `GPT` as `Net2NetTransformer` uses it (Esser et al. 2020, section 3.2).

One vocabulary there holds the codes of the image, classes, the start token and the codes of a condition. Here the rows that mean
a condition are copied into its own embedding; the null condition, which those models never saw, gets their mean.
"""

import logging
from typing import Any

import torch
from torch import Tensor

from stages.compvis_project import NO_CONDITION, Target, number
from stages.errors import ArtefactError, ConfigError
from stages.first_stage.foreign import Foreign, name_some
from stages.options import ConditioningOptions, ModelOptions
from stages.second_stage.foreign_transformer import (
    Description,
    Names,
    Request,
    Taker,
    block_names,
    check_vocabulary,
    take_named,
)

logger = logging.getLogger(__name__)

# What all its models have.
FIXED: dict[str, Any] = {
    "positions": "learned",
    "qk_norm": False,
    "norm": "layer",
    "norm_eps": 1e-5,
    "ffn": "gelu",
    "bias": True,
}
# By the parameters of the original.
DROPOUTS = {"embd_pdrop": "embedding_dropout", "resid_pdrop": "residual_dropout"}
WHOLE: Names = {
    "code_embedding.weight": ("tok_emb.weight",),
    "norm.weight": ("ln_f.weight",),
    "norm.bias": ("ln_f.bias",),
    "head.weight": ("head.weight",),
}
BLOCK: Names = {
    "attention_norm": ("ln1",),
    "attention.qkv": ("attn.query", "attn.key", "attn.value"),
    "attention.out": ("attn.proj",),
    "ffn_norm": ("ln2",),
    "ffn.up": ("mlp.0",),
    "ffn.down": ("mlp.2",),
}
OTHER_PARTS = {
    r"first_stage_model\.": "the first stage",
    r"cond_stage_model\.": "the tokenizer of the condition",
    r"loss\.": "the training losses",
}
ORDERS = ("permuter.forward_shuffle_idx", "permuter.backward_shuffle_idx")  # of every permuter but Identity
TOKENIZERS = ("VQModel", "VQSegmentationModel", "GumbelVQ")
# Of which configurations of the original say how they are used; here they are not.
UNSUPPORTED = {"attn_pdrop": 0.0, "n_unmasked": 0}


def names(num_layers: int) -> Names:
    """The names of all tensors but those of conditions and positions."""
    return WHOLE | block_names(BLOCK, num_layers, "blocks", ("weight", "bias"))


def read(foreign: Foreign, request: Request) -> Description:
    """The transformer of a file.

    Raises:
        ArtefactError: not exactly such tensors, of another codebook, in another order than rows, or with a mask that is not causal.
        ConfigError: no number of heads, or a project file, number of heads or condition that contradicts the tensors.
    """
    has_tokenizer = foreign.has("cond_stage_model.")
    take = Taker(_transformer(foreign))
    vocabulary, positions = take("tok_emb.weight", 2), take("pos_emb", 3)[0]
    check_vocabulary(foreign.path, len(vocabulary), request.codebook_size)
    num_layers, width = take.count_blocks("blocks"), vocabulary.shape[1]
    gpt = request.project.part("transformer_config") if request.project is not None else None
    params = gpt if isinstance(gpt, Target) else Target("GPT", {})
    if request.project is not None:
        found = {"vocab_size": len(vocabulary), "block_size": len(positions), "n_layer": num_layers, "n_embd": width}
        check_described(foreign.path, params, request.project.path, found)
    num_heads = _num_heads(foreign.path, request, params, width)
    _warn_unsupported(params, request)
    conditioning, num_classes, rows = _condition(request, has_tokenizer, len(positions))
    condition = vocabulary[rows]
    null = [condition.mean(0, keepdim=True)] * (conditioning.name != "none")
    weights = {
        "conditioning.embedding.weight": torch.cat([condition, *null]),
        "position_embedding.weight": _used_positions(foreign.path, positions, conditioning.num_tokens or 1, request.grid),
        **take_named(take, names(num_layers)),
    }
    take.finish()
    dropouts: dict[str, Any] = {ours: _dropout(params, theirs) for theirs, ours in DROPOUTS.items()}
    model = ModelOptions(
        num_layers=num_layers,
        hidden_size=width,
        num_heads=num_heads,
        ffn_size=len(weights["blocks.0.ffn.up.weight"]),
        **dropouts,
        **FIXED,
    )
    return Description(model=model, conditioning=conditioning, num_classes=num_classes, weights=weights)


def check_described(path: str, gpt: Target, project_path: str, found: dict[str, int]) -> None:
    """Refuses a project file that does not describe the transformer of the tensors.

    Args:
        path: of the tensors, for messages.
        gpt: the class that the project file describes.
        project_path: the project file.
        found: what the tensors show, by the names of its parameters.

    Raises:
        ConfigError: naming the first value that differs, on both sides.
    """
    for key, here in found.items():
        there = number(gpt, key, project_path)
        if there not in (None, here):
            raise ConfigError(
                f"{key} in {project_path} is {there}, but the tensors of {path} give {here}. Name the project file that came with this "
                "checkpoint, and check that the checkpoint is whole."
            )


def _transformer(foreign: Foreign) -> Foreign:
    """The tensors of the GPT alone, without constants."""
    foreign = foreign.without(OTHER_PARTS).checked()
    _check_order(foreign)
    strays = [name for name in foreign.tensors if not name.startswith("transformer.") and name not in ORDERS]
    if strays:
        raise ArtefactError(
            f"{foreign.path} has the unknown {name_some(strays)}, but a Net2NetTransformer has none of that name. Check that it is of "
            "a model without additions."
        )
    return _without_masks(foreign.part("transformer."))


def _used_positions(path: str, positions_TC: Tensor, num_tokens: int, grid: tuple[int, int]) -> Tensor:
    """The positions that a condition and the codes but the last one reach.

    Published models have as many as that (256 for a class or start token and 256 codes), or one for the last code as well (512 for
    256 codes of a condition and 256 codes). More belong to a longer sequence than the one that is asked for.
    """
    needed = num_tokens + grid[0] * grid[1] - 1
    if len(positions_TC) < needed:
        raise ArtefactError(
            f"{path} has {len(positions_TC)} positions, but {num_tokens} condition tokens and a grid of {grid[0]} x {grid[1]} codes "
            f"need {needed}. Name the image size it was trained on."
        )
    if len(positions_TC) > needed + 1:
        logger.warning(
            "%s has %d positions, and %d of them stay unused: %d condition tokens and a grid of %d x %d codes reach only %d. If it was "
            "trained on a longer condition or larger images, its samples here mean nothing.",
            path,
            len(positions_TC),
            len(positions_TC) - needed,
            num_tokens,
            *grid,
            needed,
        )
    return positions_TC[:needed]


def _dropout(gpt: Target, key: str) -> float:
    rate = gpt.params.get(key, 0.0)
    if type(rate) not in (int, float) or not 0 <= rate < 1:
        raise ConfigError(f"{key} in the project file is {rate!r}, but it must be a number from 0 to below 1. Write the number there.")
    return float(rate)


def _num_heads(path: str, request: Request, gpt: Target, width: int) -> int:
    described = number(gpt, "n_head", request.project.path) if request.project is not None else None
    if described is not None and request.num_heads not in (None, described):
        raise ConfigError(f"--num-heads is {request.num_heads}, but the project file says {described}. Leave it out.")
    found = request.num_heads or described
    if not found or found < 0 or width % found:
        raise ConfigError(
            f"--num-heads is {found}, but the tensors of {path}, of width {width}, cannot tell it, and it must divide the width. Name "
            "it, or give the checkpoint's project file with --config."
        )
    return found


def _condition(request: Request, has_tokenizer: bool, num_positions: int) -> tuple[ConditioningOptions, int, list[int]]:
    """The conditioning section, the number of its classes, and the rows of the vocabulary that its tokens look up."""
    project, num_classes, size = request.project, request.num_classes, request.codebook_size
    start = 0
    stage = project.part("cond_stage_config") if project is not None else None
    if project is not None and (stage == NO_CONDITION or project.model.params.get("unconditional")):
        num_classes, start = _agreed(num_classes, 0, project.path), number(project.model, "sos_token", project.path, 0) or 0
    elif isinstance(stage, Target) and stage.name == "Labelator" and project is not None:
        num_classes = _agreed(num_classes, number(stage, "n_classes", project.path), project.path)
    elif project is not None and isinstance(stage, Target) and stage.name not in TOKENIZERS:
        raise ConfigError(
            f"cond_stage_config in {project.path} is {stage.name}, but the conditions that can be imported are none, classes (Labelator) "
            f"and the codes of a tokenizer ({', '.join(TOKENIZERS)}). Choose another checkpoint."
        )
    elif stage is not None or has_tokenizer:
        num_tokens = num_positions - request.grid[0] * request.grid[1]
        described = number(stage, "n_embed", project.path) if project is not None and isinstance(stage, Target) else None
        num_codes = min(size, request.condition_codebook_size or described or size)
        _agreed(num_classes, num_codes, "the tokenizer of the condition")
        conditioning = ConditioningOptions(name="codes", num_tokens=max(1, num_tokens), cond_drop_prob=0.0)
        return conditioning, num_codes, list(range(num_codes))
    if num_classes is None:
        raise ConfigError(
            "--num-classes is not given, but the tensors cannot tell how many classes the condition has. Name it, 0 for none, or "
            "give the checkpoint's project file with --config."
        )
    if not 0 <= num_classes <= size or start >= size:
        raise ConfigError(
            f"The condition has {num_classes} classes and start token {start}, but they are rows of a vocabulary of {size}. Name the "
            "right number of classes."
        )
    if num_classes == 0:
        return ConditioningOptions(name="none", cond_drop_prob=0.0), 0, [start]
    return ConditioningOptions(name="class", cond_drop_prob=0.0), num_classes, list(range(num_classes))


def _agreed(asked: int | None, described: int | None, source: str) -> int | None:
    """The number of classes that is asked for and described, if not None; raises ConfigError when the two differ."""
    if None not in (asked, described) and asked != described:
        raise ConfigError(f"--num-classes is {asked}, but {source} says {described}. Leave it out, or correct that.")
    return asked if described is None else described


def _without_masks(foreign: Foreign) -> Foreign:
    """Leaves out the buffers of causal masks; raises ArtefactError for a mask of another kind."""
    for name, mask in foreign.tensors.items():
        if not name.endswith("attn.mask"):
            continue
        if mask.dim() != 4:
            raise ArtefactError(
                f"{foreign.path} has {name} of shape {tuple(mask.shape)}, but a causal mask has 4 dimensions. Check the file."
            )
        if not torch.equal(mask.bool(), torch.ones_like(mask).tril().bool()):
            raise ArtefactError(
                f"{foreign.path} has {name} that is not causal, but a prefix that sees itself whole is not supported. Choose "
                "another checkpoint."
            )
    return foreign.without({r".*\.attn\.mask$": "causal masks"})


def _check_order(foreign: Foreign) -> None:
    order = foreign.tensors.get(ORDERS[0])
    if order is None:
        return
    if order.dim() != 1:
        raise ArtefactError(
            f"{foreign.path} has {ORDERS[0]} of shape {tuple(order.shape)}, but an order of codes has 1 dimension. Check the file."
        )
    if order.tolist() != list(range(len(order))):
        raise ArtefactError(
            f"{foreign.path} was trained on codes in another order than row by row, but only that one is supported. Choose another "
            "checkpoint."
        )


def _warn_unsupported(gpt: Target, request: Request) -> None:
    given = {key: gpt.params.get(key, usual) for key, usual in UNSUPPORTED.items()}
    if request.project is not None:
        given["pkeep"] = request.project.model.params.get("pkeep", 1.0)
    for key, usual in {**UNSUPPORTED, "pkeep": 1.0}.items():
        if given.get(key, usual) != usual:
            logger.warning("%s is %s in the project file, but training on goes without it.", key, given[key])
