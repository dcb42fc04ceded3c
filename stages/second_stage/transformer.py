"""Decoder-only transformer over image codes.

Block: RMSNorm, causal attention with 2-D rotary positions and RMS-normalised queries and keys, SwiGLU (as LLaMA and LlamaGen).
The head starts at zero, so the first loss is exactly ln(codebook_size).

Shapes: B batch, P prefix tokens, L codes, T = P + L - 1 positions fed, C hidden_size, H heads, D head size, V codebook_size.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stages.errors import ConfigError
from stages.options import ConditioningOptions, ModelOptions
from stages.second_stage.blocks import Gelu, make_norm, silence_prefix
from stages.second_stage.conditioning import CONDITIONINGS, num_condition_tokens, open_conditioning
from stages.second_stage.operations import Linear, RMSNorm, add_dropout, attention, rotate, swiglu


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Everything that determines the module: options plus what follows from the code dataset."""

    codebook_size: int
    grid: tuple[int, int]
    num_classes: int
    conditioning: str
    num_layers: int
    hidden_size: int
    num_heads: int
    ffn_size: int
    residual_dropout: float
    embedding_dropout: float
    qk_norm: bool
    rope_base: float
    num_prefix_tokens: int = 1
    norm: str = "rms"
    norm_eps: float = 1e-6
    ffn: str = "swiglu"
    positions: str = "rope"
    bias: bool = False

    @property
    def num_codes(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def num_positions(self) -> int:
        """Positions fed: the prefix and all codes but the last."""
        return self.num_prefix_tokens + self.num_codes - 1

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_heads


def ffn_size(options: ModelOptions) -> int:
    """Width inside the feed-forward layer: as given, or 8/3 of the hidden size rounded up to a multiple of 64, or 4 times with GELU."""
    if options.ffn == "gelu":
        return options.ffn_size or 4 * options.hidden_size
    return options.ffn_size or math.ceil(options.hidden_size * 8 / 3 / 64) * 64


def transformer_config(
    options: ModelOptions,
    conditioning: ConditioningOptions,
    *,
    codebook_size: int,
    grid: tuple[int, int],
    num_classes: int,
) -> TransformerConfig:
    """The module asked for by the options, on a code dataset with these properties.

    Raises:
        ConfigError: the heads do not divide the width, or with rotary positions not into multiples of 4; there is no such conditioning,
            or not of so many tokens, or with rotary positions they do not lie on the grid.
    """
    is_learned, num_prefix_tokens = options.positions == "learned", num_condition_tokens(conditioning)
    unit = options.num_heads if is_learned else 4 * options.num_heads
    if options.hidden_size % unit:
        rule = "model.num_heads" if is_learned else "4 * model.num_heads (2-D rotary positions)"
        raise ConfigError(
            f"model.hidden_size is {options.hidden_size}, but it must be a multiple of {unit}, {rule}. "
            f"Use {math.ceil(options.hidden_size / unit) * unit}."
        )
    if not is_learned and prefix_stride(grid, num_prefix_tokens) is None:
        raise ConfigError(
            f"conditioning.name is {conditioning.name} with {num_prefix_tokens} tokens per image, but with rotary positions they must lie "
            f"on the grid of {grid[0]} x {grid[1]} codes, {grid[0] * grid[1]} or a power of 4 more or fewer. Use conditions of such a "
            f"grid, or set model.positions=learned."
        )
    return TransformerConfig(
        codebook_size=codebook_size,
        grid=grid,
        num_classes=num_classes,
        conditioning=conditioning.name,
        num_layers=options.num_layers,
        hidden_size=options.hidden_size,
        num_heads=options.num_heads,
        ffn_size=ffn_size(options),
        residual_dropout=options.residual_dropout,
        embedding_dropout=options.embedding_dropout,
        qk_norm=options.qk_norm,
        rope_base=options.rope_base,
        num_prefix_tokens=num_prefix_tokens,
        norm=options.norm,
        norm_eps=options.norm_eps,
        ffn=options.ffn,
        positions=options.positions,
        bias=options.bias,
    )


def block_matrix_sizes(config: TransformerConfig) -> list[int]:
    """Elements of every weight of the blocks' linear layers."""
    c = config.hidden_size
    inner = config.ffn_size if config.ffn == "gelu" else 2 * config.ffn_size
    return config.num_layers * [3 * c * c, c * c, inner * c, c * config.ffn_size]


def matrix_sizes(config: TransformerConfig) -> list[int]:
    """Elements of every weight that decays, which is the larger of the two optimizer groups: those of the linear layers."""
    return [*block_matrix_sizes(config), *_condition_sizes(config)[0], config.codebook_size * config.hidden_size]


def other_sizes(config: TransformerConfig) -> list[int]:
    """Elements of every other parameter: embeddings, norms and biases."""
    c = config.hidden_size
    norm = [c, c] if config.norm == "layer" else [c]
    inner = config.ffn_size if config.ffn == "gelu" else 2 * config.ffn_size
    block = 2 * norm + [config.head_size, config.head_size] * config.qk_norm + [3 * c, c, inner, c] * config.bias
    is_learned = config.positions == "learned"
    positions = [config.num_positions * c] * is_learned
    return config.num_layers * block + norm + [*_condition_sizes(config)[1], config.codebook_size * c, *positions]


def _condition_sizes(config: TransformerConfig) -> tuple[list[int], list[int]]:
    """Of the conditioning's weights that decay, and of its others; a class of the user's own is built, for only that tells."""
    if config.conditioning in CONDITIONINGS:
        return [], [(1 if config.conditioning == "none" else config.num_classes + 1) * config.hidden_size]
    conditioning = open_conditioning(config.conditioning, config.num_classes, config.hidden_size, config.num_prefix_tokens)
    decaying = {id(p) for p in parameter_groups(conditioning, 0.0)[0]["params"]}
    decayed, others = ([p.numel() for p in conditioning.parameters() if (id(p) in decaying) is does] for does in (True, False))
    return decayed, others


def num_parameters(config: TransformerConfig) -> int:
    """Parameters of the module, without building its layers."""
    return sum(matrix_sizes(config)) + sum(other_sizes(config))


def prefix_stride(grid: tuple[int, int], num_prefix_tokens: int) -> float | None:
    """Cells of the grid from one condition token to the next, a power of 2; 0 for a single token, which has no place; else None."""
    if num_prefix_tokens == 1:
        return 0.0
    exponent = math.log2(grid[0] * grid[1] / num_prefix_tokens) / 2
    stride = 2.0**exponent
    fits = exponent.is_integer() and (grid[0] / stride).is_integer() and (grid[1] / stride).is_integer()
    return stride if fits else None


def rope_angles(grid: tuple[int, int], num_prefix_tokens: int, head_size: int, base: float) -> Tensor:
    """Rotation angles (P + L, D / 2): half of the pairs turn with the row, half with the column.

    A single prefix token does not turn; more are those of a condition with a grid of its own, and turn like the middle of the cells
    that they cover.
    """
    stride = prefix_stride(grid, num_prefix_tokens)
    codes = grid_angles(grid, 1.0, head_size, base)
    if not stride:
        return torch.cat([torch.zeros(num_prefix_tokens, codes.shape[1]), codes])
    height, width = round(grid[0] / stride), round(grid[1] / stride)
    return torch.cat([grid_angles((height, width), stride, head_size, base), codes])


def grid_angles(grid: tuple[int, int], stride: float, head_size: int, base: float) -> Tensor:
    """Rotation angles (h * w, D / 2) of cells that are `stride` cells of a grid of codes wide."""
    num_pairs = head_size // 4
    frequencies = base ** (-torch.arange(num_pairs, dtype=torch.float32) / num_pairs)
    rows, columns = (stride * (torch.arange(n, dtype=torch.float32) + 0.5) - 0.5 for n in grid)
    by_row, by_column = rows[:, None, None] * frequencies, columns[None, :, None] * frequencies
    angles = torch.cat([by_row.expand(-1, grid[1], -1), by_column.expand(grid[0], -1, -1)], dim=-1)
    return angles.flatten(0, 1)


@functools.lru_cache(maxsize=8)
def rotations(config: TransformerConfig, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the angles of all positions, (P + L, D / 2) each; made once, as every step of sampling needs them."""
    with torch.inference_mode(False):  # else they could not be used in training later
        angles = rope_angles(config.grid, config.num_prefix_tokens, config.head_size, config.rope_base).to(device)
        cos_TD, sin_TD = angles.cos().to(dtype), angles.sin().to(dtype)
        if config.positions == "rope-zero-prefix":
            cos_TD = silence_prefix(cos_TD, config.num_prefix_tokens)
    return cos_TD, sin_TD


class KVCache:
    """Keys and values of all layers in tensors of fixed size (layers, 2, B, H, T, D), filled from the left."""

    def __init__(
        self,
        config: TransformerConfig,
        batch_size: int,
        num_positions: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ):
        shape = (config.num_layers, 2, batch_size, config.num_heads, num_positions, config.head_size)
        self.tensor = torch.zeros(shape, dtype=dtype, device=device)
        self.length = 0

    def append(self, layer: int, k_BHTD: Tensor, v_BHTD: Tensor) -> tuple[Tensor, Tensor]:
        """Stores the new positions of one layer and returns all its keys and values so far."""
        end = self.length + k_BHTD.shape[2]
        keys, values = self.tensor[layer, 0], self.tensor[layer, 1]
        keys[:, :, self.length : end] = k_BHTD
        values[:, :, self.length : end] = v_BHTD
        return keys[:, :, :end], values[:, :, :end]


class Attention(nn.Module):
    """Causal multi-head attention."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.num_heads = config.num_heads
        self.is_rotary = config.positions != "learned"
        self.qkv = Linear(config.hidden_size, 3 * config.hidden_size, config.bias)
        self.out = Linear(config.hidden_size, config.hidden_size, config.bias)
        self.q_norm = RMSNorm(config.head_size) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_size) if config.qk_norm else nn.Identity()

    def forward(self, x_BTC: Tensor, cos_TD: Tensor, sin_TD: Tensor, cache: KVCache | None, layer: int) -> Tensor:
        b, t, c = x_BTC.shape
        q, k, v = self.qkv(x_BTC).view(b, t, 3, self.num_heads, c // self.num_heads).unbind(2)
        q, k, v = self.q_norm(q), self.k_norm(k), v.transpose(1, 2)
        if self.is_rotary:
            q, k = rotate(q, cos_TD, sin_TD), rotate(k, cos_TD, sin_TD)
        else:
            q, k = q.transpose(1, 2), k.transpose(1, 2)
        if cache is not None:
            k, v = cache.append(layer, k, v)
        # One new position sees everything before it, so only a whole sequence needs the mask.
        mixed_BHTD = attention(q, k, v, is_causal=t > 1)
        return self.out(mixed_BHTD.transpose(1, 2).reshape(b, t, c))


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, hidden_size: int, ffn_size: int, bias: bool = False):
        super().__init__()
        self.gate_up = Linear(hidden_size, 2 * ffn_size, bias)
        self.down = Linear(ffn_size, hidden_size, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(swiglu(self.gate_up(x)))


class Block(nn.Module):
    """Pre-norm attention and feed-forward layer, each added with dropout."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.attention_norm = make_norm(config.norm, config.hidden_size, config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = make_norm(config.norm, config.hidden_size, config.norm_eps)
        is_gelu = config.ffn == "gelu"
        self.ffn = (Gelu if is_gelu else SwiGLU)(config.hidden_size, config.ffn_size, config.bias)
        self.dropout = config.residual_dropout

    def forward(self, x_BTC: Tensor, cos_TD: Tensor, sin_TD: Tensor, cache: KVCache | None, layer: int) -> Tensor:
        mixed_BTC = self.attention(self.attention_norm(x_BTC), cos_TD, sin_TD, cache, layer)
        x_BTC = add_dropout(x_BTC, mixed_BTC, self.dropout, self.training)
        return add_dropout(x_BTC, self.ffn(self.ffn_norm(x_BTC)), self.dropout, self.training)


class Transformer(nn.Module):
    """Predicts each code from the condition and the codes before it, in raster order.

    Args:
        config: shapes.
        checkpoint_activations: keep only the input of every block for the backward pass and compute the rest again (Chen et al. 2016).
    """

    def __init__(self, config: TransformerConfig, *, checkpoint_activations: bool = False):
        super().__init__()
        self.config, self.checkpoint_activations = config, checkpoint_activations
        self.conditioning = open_conditioning(
            config.conditioning, config.num_classes, config.hidden_size, config.num_prefix_tokens
        )
        self.code_embedding = nn.Embedding(config.codebook_size, config.hidden_size)
        self.embedding_dropout = nn.Dropout(config.embedding_dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        is_learned = config.positions == "learned"
        self.position_embedding = nn.Embedding(config.num_positions, config.hidden_size) if is_learned else None
        self.norm = make_norm(config.norm, config.hidden_size, config.norm_eps)
        self.head = Linear(config.hidden_size, config.codebook_size)
        for child in self.children():
            if child is not self.conditioning or config.conditioning in CONDITIONINGS:  # a class of the user's own keeps its weights
                child.apply(self._initialize)
        nn.init.zeros_(self.head.weight)

    def _initialize(self, module: nn.Module) -> None:
        """N(0, 0.02); what a branch adds to the residual stream starts smaller by sqrt(2 * layers) (as GPT-2)."""
        branch_std = 0.02 / math.sqrt(2 * self.config.num_layers)
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        elif isinstance(module, Attention):  # visited after its own linear layers
            nn.init.normal_(module.out.weight, std=branch_std)
        elif isinstance(module, SwiGLU | Gelu):
            nn.init.normal_(module.down.weight, std=branch_std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def forward(self, codes_BL: Tensor, labels_B: Tensor) -> Tensor:
        """Logits of every code of whole sequences, (B, L, V), for int64 codes (B, L) and labels (B,), or (B, P) of a condition of codes."""
        x_BTC = torch.cat([self.conditioning(labels_B), self.code_embedding(codes_BL[:, :-1])], dim=1)
        hidden = self._run(x_BTC, 0, None)
        return self.head(hidden[:, self.conditioning.num_prefix_tokens - 1 :])

    def prefill(self, labels_B: Tensor, cache: KVCache) -> Tensor:
        """Feeds the condition; logits of the first code (B, V)."""
        return self.head(self._run(self.conditioning(labels_B), 0, cache)[:, -1])

    def step(self, codes_B: Tensor, cache: KVCache) -> Tensor:
        """Feeds one code per row; logits of the next (B, V)."""
        return self.head(self._run(self.code_embedding(codes_B)[:, None], cache.length, cache)[:, -1])

    def _run(self, x_BTC: Tensor, start: int, cache: KVCache | None) -> Tensor:
        t = x_BTC.shape[1]
        cos_TD, sin_TD = (table[start : start + t] for table in rotations(self.config, x_BTC.dtype, x_BTC.device))
        if self.position_embedding is not None:
            x_BTC = x_BTC + self.position_embedding(torch.arange(start, start + t, device=x_BTC.device))
        x_BTC = self.embedding_dropout(x_BTC)
        for layer, block in enumerate(self.blocks):
            if self.checkpoint_activations and self.training:
                x_BTC = checkpoint(block, x_BTC, cos_TD, sin_TD, cache, layer, use_reentrant=False)
            else:
                x_BTC = block(x_BTC, cos_TD, sin_TD, cache, layer)
        if cache is not None:
            cache.length += t
        return self.norm(x_BTC)


def nll(logits_BLV: Tensor, codes_BL: Tensor) -> Tensor:
    """Negative log-likelihood in nats per image (B,), float32: summed over codes."""
    losses = F.cross_entropy(logits_BLV.float().flatten(0, 1), codes_BL.flatten(), reduction="none")
    return losses.view(codes_BL.shape).sum(1)


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two AdamW groups: matrices of linear layers decay, embeddings and norms do not."""
    embeddings = {id(p) for m in module.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    parameters = [p for p in module.parameters() if p.requires_grad]
    is_decayed = [len(getattr(p, "ds_shape", p.shape)) >= 2 and id(p) not in embeddings for p in parameters]
    return [
        {"params": [p for p, decayed in zip(parameters, is_decayed) if decayed], "weight_decay": weight_decay},
        {"params": [p for p, decayed in zip(parameters, is_decayed) if not decayed], "weight_decay": 0.0},
    ]
