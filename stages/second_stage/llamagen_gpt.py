"""Weights of LlamaGen's class-conditional GPT (Sun et al. 2024).

Blocks are like the default ones, without a norm of queries and keys. Rotations are the same, but pairs are neighbours there
and halves of a head here, so the rows of queries and keys change places.
"""

import torch
from torch import Tensor

from stages.errors import ArtefactError, ConfigError
from stages.first_stage.foreign import Foreign
from stages.options import ConditioningOptions, ModelOptions
from stages.second_stage.foreign_transformer import Description, Request, Taker, check_vocabulary

# Heads by (layers, width) of the published sizes: B, L, XL, XXL, 3B, 1B, 7B.
HEADS = {(12, 768): 12, (24, 1024): 16, (36, 1280): 20, (48, 1536): 24, (24, 3200): 32, (22, 2048): 32, (32, 4096): 32}
NORM_EPS, ROPE_BASE, DROPOUT = 1e-5, 10_000.0, 0.1
# Tables that follow from the sizes.
DERIVED = {"freqs_cis$": "the table of rotations", "causal_mask$": "the causal mask"}


def read(foreign: Foreign, request: Request) -> Description:
    """The transformer of a file.

    Raises:
        ArtefactError: not exactly such tensors, or of another codebook.
        ConfigError: a size that was not published, without num_heads, or another number of classes than is asked for.
    """
    take = Taker(foreign.without(DERIVED).checked())
    if foreign.has("cls_embedding.cap_proj"):
        raise ArtefactError(
            f"{foreign.path} is conditioned on text, but only class-conditional models are supported. Choose a c2i checkpoint."
        )
    codes = take("tok_embeddings.weight", 2)
    check_vocabulary(foreign.path, len(codes), request.codebook_size)
    num_layers, width = take.count_blocks("layers"), codes.shape[1]
    num_heads = HEADS.get((num_layers, width)) if request.num_heads is None else request.num_heads
    if num_heads is None or num_heads < 1 or width % (4 * num_heads):
        raise ConfigError(
            f"--num-heads is {num_heads}, but a transformer of {num_layers} layers and width {width} needs a number of heads that "
            "divides its width into multiples of 4. Name it as it was trained."
        )
    classes = take("cls_embedding.embedding_table.weight", 2)
    num_classes = _num_classes(foreign.path, len(classes), request.num_classes)
    weights = {
        "code_embedding.weight": codes,
        "conditioning.embedding.weight": classes,
        "norm.weight": take("norm.weight", 1),
        "head.weight": take("output.weight", 2),
    }
    for layer in range(num_layers):
        weights |= _block(take, layer, num_heads, width)
    take.finish()
    model = ModelOptions(
        num_layers=num_layers,
        hidden_size=width,
        num_heads=num_heads,
        ffn_size=weights["blocks.0.ffn.down.weight"].shape[1],
        residual_dropout=DROPOUT,
        embedding_dropout=DROPOUT,
        qk_norm=False,
        rope_base=ROPE_BASE,
        norm_eps=NORM_EPS,
        positions="rope-zero-prefix",
    )
    conditioning = ConditioningOptions(name="class")
    return Description(model=model, conditioning=conditioning, num_classes=num_classes, weights=weights)


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


def _block(take: Taker, layer: int, num_heads: int, width: int) -> dict[str, Tensor]:
    theirs, ours = f"layers.{layer}.", f"blocks.{layer}."
    qkv = take(f"{theirs}attention.wqkv.weight", 2)
    if qkv.shape != (3 * width, width):
        raise ArtefactError(
            f"{take.path} has {theirs}attention.wqkv.weight of shape {tuple(qkv.shape)}, but only models of one width with as "
            "many key as query heads are supported. Choose another checkpoint."
        )
    q, k, v = qkv.chunk(3)
    gate_up = take.join((f"{theirs}feed_forward.w1.weight", f"{theirs}feed_forward.w3.weight"), 2)
    return {
        f"{ours}attention_norm.weight": take(f"{theirs}attention_norm.weight", 1),
        f"{ours}attention.qkv.weight": torch.cat([_halves(q, num_heads), _halves(k, num_heads), v]),
        f"{ours}attention.out.weight": take(f"{theirs}attention.wo.weight", 2),
        f"{ours}ffn_norm.weight": take(f"{theirs}ffn_norm.weight", 1),
        f"{ours}ffn.gate_up.weight": gate_up,
        f"{ours}ffn.down.weight": take(f"{theirs}feed_forward.w2.weight", 2),
    }


def _halves(rows_CC: Tensor, num_heads: int) -> Tensor:
    """Rows of each head (x0, y0, x1, y1, ...) as (x0, x1, ..., y0, y1, ...)."""
    size = rows_CC.shape[1]
    return rows_CC.view(num_heads, -1, 2, size).transpose(1, 2).reshape(-1, size)
