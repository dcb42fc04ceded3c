"""Transformers to the files of CompVis/taming-transformers (`Net2NetTransformer` with `GPT`) and LlamaGen (class-conditional)."""

import os

import torch
import yaml
from torch import Tensor

from stages.second_stage import compvis_gpt_export, llamagen_gpt
from stages.second_stage.transformer import TransformerConfig

WRITERS = {"compvis": compvis_gpt_export.write, "llamagen": llamagen_gpt.write}
# What the tensors are called, and what the model is built with: a project file, and arguments of `ModelArgs`.
FILES = {"compvis": ("transformer.ckpt", "project.yaml"), "llamagen": ("transformer.pt", "model-args.yaml")}


def export_transformer(config: TransformerConfig, weights: dict[str, Tensor], format: str, folder: str) -> tuple[str, str]:
    """Writes a transformer the way another project stores it.

    Importing the file gives back the same tensors, but for a null condition and a start token that CompVis' cannot hold.

    Args:
        config: of the transformer.
        weights: by the names of `Transformer`.
        format: "compvis" (dict under `state_dict`) or "llamagen" (dict under `model`).
        folder: a local folder that is there.

    Returns:
        Names of the files in it: the tensors, and the parameters they belong to.

    Raises:
        ConfigError: a transformer that the other project's code does not build; it names the option.
    """
    export = WRITERS[format](config, weights)
    tensors, parameters = FILES[format]
    torch.save(export.content, os.path.join(folder, tensors))
    with open(os.path.join(folder, parameters), "w", encoding="utf-8") as file:
        yaml.safe_dump(export.parameters, file, sort_keys=False)
    return tensors, parameters
