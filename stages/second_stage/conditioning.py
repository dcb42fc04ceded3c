"""What precedes the codes. A conditioning embeds labels into prefix tokens with a vocabulary of its own.

Code ids and condition ids never share an embedding row. The null condition, used for classifier-free guidance
(Ho and Salimans 2022), is one extra row.
"""

import torch
from torch import Tensor, nn

from stages.errors import ConfigError
from stages.options import ConditioningOptions
from stages.registry import import_named


class Conditioning(nn.Module):
    """What a conditioning is: a module from labels to prefix tokens.

    Attributes:
        num_prefix_tokens: tokens per image; an attribute of the class, since positions are laid out before there is a module.
        is_conditional: whether labels make a difference, and so whether guidance can.
    """

    num_prefix_tokens = 1
    is_conditional = True

    def null(self, labels_B: Tensor) -> Tensor:
        """Labels of the same shape that mean "no condition"."""
        return torch.full_like(labels_B, -1)


class ClassConditioning(Conditioning):
    """One prefix token per image: its class, or the null condition where the label is negative."""

    def __init__(self, num_classes: int, hidden_size: int):
        super().__init__()
        if num_classes < 1:
            raise ConfigError(
                "conditioning.name is class, but the code dataset has no classes. Use conditioning.name=none, or a source with labels."
            )
        self.num_classes = num_classes
        self.embedding = nn.Embedding(num_classes + 1, hidden_size)

    def forward(self, labels_B: Tensor) -> Tensor:
        """int64 labels (B,), negative for null, to prefix (B, 1, hidden_size)."""
        return self.embedding(torch.where(labels_B < 0, self.num_classes, labels_B))[:, None]


class CodesConditioning(Conditioning):
    """Codes of another tokenizer, such as one of label maps or depth, before the codes of the image (Esser et al. 2020, section 3.2).

    Args:
        num_classes: of that tokenizer's codebook.
        hidden_size: width.
        num_prefix_tokens: codes per image.
    """

    def __init__(self, num_classes: int, hidden_size: int, num_prefix_tokens: int):
        super().__init__()
        self.num_classes, self.num_prefix_tokens = num_classes, num_prefix_tokens
        self.embedding = nn.Embedding(num_classes + 1, hidden_size)

    def forward(self, labels_BP: Tensor) -> Tensor:
        """int64 codes (B, P), negative for null, to prefix (B, P, hidden_size)."""
        return self.embedding(torch.where(labels_BP < 0, self.num_classes, labels_BP))


class NoConditioning(Conditioning):
    """One learned start token, whatever the label."""

    is_conditional = False

    def __init__(self, num_classes: int, hidden_size: int):
        super().__init__()
        self.embedding = nn.Embedding(1, hidden_size)

    def forward(self, labels_B: Tensor) -> Tensor:
        """Labels (B,), ignored, to prefix (B, 1, hidden_size)."""
        return self.embedding(torch.zeros_like(labels_B))[:, None]


CONDITIONINGS = {
    "class": "stages.second_stage.conditioning:ClassConditioning",
    "codes": "stages.second_stage.conditioning:CodesConditioning",
    "none": "stages.second_stage.conditioning:NoConditioning",
}


def num_condition_tokens(options: ConditioningOptions) -> int:
    """Prefix tokens per image: as many as given with "codes"; other conditionings know theirs.

    Raises:
        ConfigError: no such conditioning, or one of another number of tokens than is given.
    """
    if options.name == "codes":
        return options.num_tokens or 1
    cls = import_named("conditioning.name", options.name, CONDITIONINGS)
    num_tokens = getattr(cls, "num_prefix_tokens", Conditioning.num_prefix_tokens)
    if not isinstance(num_tokens, int):
        raise ConfigError(
            f"conditioning.name is {options.name} with num_prefix_tokens {num_tokens!r}, but positions are laid out before there is a "
            f"module. Make it an attribute of the class, a number."
        )
    if options.num_tokens not in (None, num_tokens):
        raise ConfigError(
            f"conditioning.num_tokens is {options.num_tokens}, but conditioning.name={options.name} has {num_tokens} per image. "
            f"Leave it out."
        )
    return num_tokens


def open_conditioning(name: str, num_classes: int, hidden_size: int, num_prefix_tokens: int = 1) -> Conditioning:
    """The conditioning of that name, or at that `package.module:Class`.

    Args:
        name: of it.
        num_classes: of the code dataset, or of the codebook of "codes".
        hidden_size: width.
        num_prefix_tokens: of `num_condition_tokens`.

    Raises:
        ConfigError: no such name, or a module with another number of tokens.
    """
    cls = import_named("conditioning.name", name, CONDITIONINGS)
    if name == "codes":
        return cls(num_classes, hidden_size, num_prefix_tokens)
    opened = cls(num_classes, hidden_size)
    if opened.num_prefix_tokens != num_prefix_tokens:
        raise ConfigError(
            f"conditioning.name is {name} with {opened.num_prefix_tokens} tokens per image, but positions are laid out for "
            f"{num_prefix_tokens}. Make num_prefix_tokens an attribute of the class, and train such a model anew."
        )
    return opened
