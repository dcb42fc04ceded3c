"""What is asked of, and found in, another project's transformer."""

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from stages.errors import ArtefactError
from stages.first_stage.foreign import Foreign, name_some
from stages.options import ConditioningOptions, ModelOptions
from stages.project_config import Project


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
