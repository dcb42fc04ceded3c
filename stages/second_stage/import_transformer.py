"""Transformers from the checkpoints of CompVis/taming-transformers (`Net2NetTransformer` with `GPT`) and LlamaGen (class-conditional).

What the originals keep in one vocabulary is taken apart: condition tokens get an embedding of their own, filled with the rows that
the original looked up, so that logits are the same. Everything that a file holds is used or named in the log.
"""

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from stages.compvis_project import Project
from stages.errors import ArtefactError, ConfigError
from stages.first_stage.foreign import Foreign
from stages.first_stage.tokenizer import Tokenizer
from stages.options import ConditioningOptions, ModelOptions
from stages.second_stage import compvis_gpt, llamagen_gpt
from stages.second_stage.foreign_transformer import Request
from stages.second_stage.transformer import Transformer, TransformerConfig, transformer_config

logger = logging.getLogger(__name__)

FORMATS = ("compvis", "llamagen")


@dataclass(frozen=True, kw_only=True)
class ImportedTransformer:
    """A transformer and how a configuration describes it.

    Attributes:
        model, conditioning: the sections.
        config: what follows from them and the tokenizer.
        weights: float32, by the names of `Transformer`.
    """

    model: ModelOptions
    conditioning: ConditioningOptions
    config: TransformerConfig
    weights: dict[str, Tensor]


def detect_transformer(foreign: Foreign) -> str | None:
    """The format of a transformer's checkpoint; None if it is neither."""
    found = {"compvis": "transformer.tok_emb.weight", "llamagen": "tok_embeddings.weight"}
    return next((format for format, name in found.items() if name in foreign.tensors), None)


def take_transformer(
    foreign: Foreign,
    tokenizer: Tokenizer,
    *,
    project: Project | None = None,
    format: str = "auto",
    num_heads: int | None = None,
    num_classes: int | None = None,
    image_size: int | None = None,
    condition_tokenizer: Tokenizer | None = None,
) -> ImportedTransformer:
    """The transformer in a checkpoint.

    Args:
        foreign: the file.
        tokenizer: whose codes it speaks.
        project: the project file of a CompVis checkpoint.
        format: "compvis", "llamagen", or "auto" to tell by the tensors' names.
        num_heads: attention heads, where neither project nor the published sizes tell.
        num_classes: of a class condition, where neither project nor tensors tell.
        image_size: side of its images in pixels; the tokenizer's resolution if not given.
        condition_tokenizer: whose codes condition it, where the checkpoint holds one.

    Raises:
        ConfigError: something that the tensors cannot tell is missing, or contradicts them.
        ArtefactError: not exactly the tensors of such a transformer, or one of another codebook.
    """
    found = detect_transformer(foreign)
    if found is None or format not in ("auto", found):
        raise ArtefactError(
            f"{foreign.path} has no transformer of {format if format in FORMATS else ' or '.join(FORMATS)}, but "
            f"import-transformer needs one. Choose {f'--format {found}' if found else 'another checkpoint'}."
        )
    if found == "llamagen" and project is not None:
        raise ConfigError(f"--config is {project.path}, but LlamaGen's checkpoints come without a project file. Leave it out.")
    grid = _grid(tokenizer, image_size)
    request = Request(
        codebook_size=tokenizer.codebook_size,
        grid=grid,
        num_heads=num_heads,
        num_classes=num_classes,
        project=project,
        condition_codebook_size=condition_tokenizer.codebook_size if condition_tokenizer is not None else None,
    )
    read = compvis_gpt.read if found == "compvis" else llamagen_gpt.read
    description = read(foreign, request)
    config = transformer_config(
        description.model,
        description.conditioning,
        codebook_size=tokenizer.codebook_size,
        grid=grid,
        num_classes=description.num_classes,
    )
    _check(foreign.path, config, description.weights)
    return ImportedTransformer(
        model=description.model,
        conditioning=description.conditioning,
        config=config,
        weights={name: tensor.to(torch.float32).contiguous() for name, tensor in description.weights.items()},
    )


def _grid(tokenizer: Tokenizer, image_size: int | None) -> tuple[int, int]:
    """Codes of an image of that size."""
    unit = tokenizer.downsample
    if image_size is not None and (image_size < unit or image_size % unit):
        raise ConfigError(
            f"--image-size is {image_size}, but a code of the tokenizer stands for {unit} x {unit} pixels, so it must be a multiple of "
            f"{unit}. Name the size that the transformer was trained on."
        )
    return tokenizer.grid(tokenizer.config.resolution if image_size is None else image_size)


def _check(path: str, config: TransformerConfig, weights: dict[str, Tensor]) -> None:
    with torch.device("meta"):
        expected = {name: tensor.shape for name, tensor in Transformer(config).state_dict().items()}
    for name in sorted(expected.keys() | weights.keys()):
        there, here = weights.get(name), expected.get(name)
        if there is None or here is None or there.shape != here:
            shape = "nothing" if there is None else f"shape {tuple(there.shape)}"
            raise ArtefactError(
                f"{path} gives {shape} for {name}, but the other tensors ask for {tuple(here) if here else 'nothing'}. Check that "
                "the checkpoint is whole."
            )
