"""What is asked of, found in, and written as another project's transformer.

Each project's names stand in one table, by the names here: several there are parts, one below the other, of one tensor here.
Reading and writing both go by it.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stages.compvis_project import Project
from stages.errors import ArtefactError, ConfigError
from stages.first_stage.foreign import Foreign, name_some
from stages.options import ConditioningOptions, ModelOptions
from stages.second_stage.transformer import TransformerConfig

Names = dict[str, tuple[str, ...]]


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a user says, and what the tokenizer tells."""

    codebook_size: int
    grid: tuple[int, int]
    num_heads: int | None
    num_classes: int | None
    project: Project | None
    condition_codebook_size: int | None = None


@dataclass(frozen=True, kw_only=True)
class Description:
    """A transformer as sections of a configuration, with its weights by the names of `Transformer`."""

    model: ModelOptions
    conditioning: ConditioningOptions
    num_classes: int
    weights: dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Export:
    """A transformer as another project stores it.

    Attributes:
        content: what its own code loads.
        parameters: what it is built with, as its configurations say it.
    """

    content: dict[str, Any]
    parameters: dict[str, Any]


class Taker:
    """Hands out the tensors of a checkpoint and knows which were never asked for."""

    def __init__(self, foreign: Foreign):
        self.path = foreign.path
        self._tensors, self._left = foreign.tensors, set(foreign.tensors)

    def __call__(self, name: str, rank: int) -> Tensor:
        """The tensor of this name and number of dimensions, as float32.

        Raises:
            ArtefactError: there is none, or it holds no real numbers.
        """
        tensor = self._tensors.get(name)
        if tensor is None or tensor.dim() != rank or not tensor.numel():
            state = "no" if tensor is None else f"a {tuple(tensor.shape)}"
            raise ArtefactError(
                f"{self.path} has {state} {name}, but its transformer needs one of {rank} dimensions. Check the file."
            )
        if not tensor.is_floating_point():
            raise ArtefactError(f"{self.path} has {name} of {tensor.dtype}, but weights are floating-point numbers. Check the file.")
        self._left.discard(name)
        return tensor.to(torch.float32)

    def join(self, names: tuple[str, ...], rank: int) -> Tensor:
        """Tensors of these names and one shape, one below the other.

        Raises:
            ArtefactError: one is missing or of another shape than the first.
        """
        parts = [self(name, rank) for name in names]
        for name, part in zip(names, parts, strict=True):
            if part.shape != parts[0].shape:
                raise ArtefactError(
                    f"{self.path} has {name} of shape {tuple(part.shape)}, but {names[0]} has {tuple(parts[0].shape)}, and both must be "
                    "alike. Check the file."
                )
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def count_blocks(self, prefix: str) -> int:
        """How many different numbers follow the prefix in names.

        Raises:
            ArtefactError: none.
        """
        pattern = re.escape(prefix) + r"\.(\d+)\."
        found = {match[1] for name in self._tensors if (match := re.match(pattern, name))}
        if not found:
            raise ArtefactError(f"{self.path} has no {prefix}.*, but a transformer has one block at least. Check that the file is whole.")
        return len(found)

    def finish(self) -> None:
        """Raises ArtefactError when tensors are left over."""
        if self._left:
            raise ArtefactError(
                f"{self.path} has the unknown {name_some(sorted(self._left))}, but a transformer of this shape has none of that "
                "name. Check that it is of a model without additions."
            )


def check_vocabulary(path: str, vocabulary: int, codebook_size: int) -> None:
    """Refuses a transformer that does not speak the tokenizer's codes.

    Raises:
        ArtefactError: naming both sizes.
    """
    if vocabulary != codebook_size:
        raise ArtefactError(
            f"{path} has a transformer of {vocabulary} codes, but the tokenizer has {codebook_size}. Name the tokenizer that it was "
            "trained with."
        )


def block_names(block: Names, num_layers: int, prefix: str, kinds: Sequence[str]) -> Names:
    """The names of all tensors of all blocks.

    Args:
        block: names in one block.
        num_layers: blocks.
        prefix: what comes before a block's number there.
        kinds: the last parts of the names: weight, bias.
    """
    return {
        f"blocks.{layer}.{ours}.{kind}": tuple(f"{prefix}.{layer}.{name}.{kind}" for name in theirs)
        for layer in range(num_layers)
        for ours, theirs in block.items()
        for kind in kinds
    }


def take_named(take: Taker, names: Names) -> dict[str, Tensor]:
    """The tensors of a file by the names here. Raises what `Taker.join` raises."""
    return {ours: take.join(theirs, 1 if "norm" in ours or ours.endswith("bias") else 2) for ours, theirs in names.items()}


def give_named(weights: dict[str, Tensor], names: Names) -> dict[str, Tensor]:
    """The way back of `take_named`. Tensors share no memory, so that a file holds each once."""
    found: dict[str, Tensor] = {}
    for ours, theirs in names.items():
        parts = weights[ours].to(torch.float32).chunk(len(theirs))
        found |= {name: part.clone() for name, part in zip(theirs, parts, strict=True)}
    return found


def check_buildable(config: TransformerConfig, fixed: dict[str, Any], owner: str) -> None:
    """Refuses a transformer that another project's code builds in another way.

    Args:
        config: of the transformer.
        fixed: what that code builds in one way only, by the keys here.
        owner: of that code, for messages.

    Raises:
        ConfigError: naming the first option that differs.
    """
    for key, needed in fixed.items():
        if (value := getattr(config, key)) != needed:
            raise ConfigError(
                f"model.{key} is {value}, but {owner} has {needed} only. Train with model.{key}={needed}, or use the command export, "
                "which writes every transformer under the names it has here."
            )
