"""What is asked of, and found in, another project's transformer."""

import re
from dataclasses import dataclass

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
        """The tensor of this name and number of dimensions.

        Raises:
            ArtefactError: there is none.
        """
        tensor = self._tensors.get(name)
        if tensor is None or tensor.dim() != rank or not tensor.numel():
            state = "no" if tensor is None else f"a {tuple(tensor.shape)}"
            raise ArtefactError(
                f"{self.path} has {state} {name}, but its transformer needs one of {rank} dimensions. Check the file."
            )
        self._left.discard(name)
        return tensor

    def count(self, pattern: str) -> int:
        """How many different numbers the first group of the pattern matches at the start of names."""
        return len({match[1] for name in self._tensors if (match := re.match(pattern, name))})

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
