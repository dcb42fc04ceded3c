"""The `export` and `export-transformer` commands: the weights of a checkpoint for inference elsewhere."""

import json
import logging
import os
import tempfile
from dataclasses import dataclass

import torch
from safetensors.torch import save_file

from cluster import checkpoints
from cluster.checkpoints import AVERAGES, SAMPLED_FROM, WEIGHTS
from cluster.sampler_actor import load_weights
from pipeline import storage
from stages.config import build
from stages.errors import ArtefactError
from stages.second_stage import export_transformer as foreign
from stages.second_stage.transformer import TransformerConfig

logger = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CONFIG = "config.json"


@dataclass(frozen=True, kw_only=True)
class ExportSummary:
    """What `export` and `export-transformer` report."""

    weights: str
    config: str
    step: int


def export(checkpoint: str, output: str, *, which: str, dtype: str) -> ExportSummary:
    """Writes transformer.safetensors, and config.json with the shapes of the model and what it was trained on.

    Args:
        checkpoint: folder of a committed checkpoint, of any world size and ZeRO stage.
        output: local or s3:// folder.
        which: "average" or "last", as for `cluster.sampler_actor.load_weights`.
        dtype: "fp32" or "bf16".

    Raises:
        ArtefactError: no checkpoint, a damaged one, or an output that holds other weights already.
    """
    commit = checkpoints.open_verified(checkpoint, SAMPLED_FROM)
    weights = {name: tensor.to(DTYPES[dtype]) for name, tensor in load_weights(commit, which).items()}
    description = {
        "transformer": commit.content["transformer"],
        "weights": _taken(commit, which),
        "dtype": dtype,
        "step": commit.step,
        "checkpoint": commit.hash,
        "code_dataset": commit.root_hash,
        "tokenizer_fingerprint": commit.tokenizer_fingerprint,
    }
    with tempfile.TemporaryDirectory(prefix="tessera-export-") as folder:
        save_file(weights, os.path.join(folder, WEIGHTS), metadata={"format": "pt"})
        with open(os.path.join(folder, CONFIG), "w") as file:
            json.dump(description, file, indent=1)
        for name in (WEIGHTS, CONFIG):
            _store(os.path.join(folder, name), storage.join(output, name))
    return ExportSummary(weights=storage.join(output, WEIGHTS), config=storage.join(output, CONFIG), step=commit.step)


def export_transformer(checkpoint: str, output: str, *, format: str, which: str) -> ExportSummary:
    """Writes the transformer as another project stores it, with a file of the parameters that its code builds it with.

    Args:
        checkpoint: folder of a committed checkpoint, of any world size and ZeRO stage.
        output: local or s3:// folder.
        format: "compvis" or "llamagen".
        which: "average" or "last", as for `cluster.sampler_actor.load_weights`.

    Raises:
        ConfigError: a transformer that the other project's code does not build; it names the option.
        ArtefactError: no checkpoint, a damaged one, or an output that holds something else already.
    """
    commit = checkpoints.open_verified(checkpoint, SAMPLED_FROM)
    config = build(TransformerConfig, commit.content["transformer"])
    weights = load_weights(commit, which)
    with tempfile.TemporaryDirectory(prefix="tessera-export-") as folder:
        names = foreign.export_transformer(config, weights, format, folder)
        for name in names:
            _store(os.path.join(folder, name), storage.join(output, name))
    logger.info("The %s weights of step %d are in %s", _taken(commit, which), commit.step, output)
    file, parameters = (storage.join(output, name) for name in names)
    return ExportSummary(weights=file, config=parameters, step=commit.step)


def _taken(commit: checkpoints.Commit, which: str) -> str:
    """Which weights `load_weights` gives."""
    return "average" if which == "average" and commit.has(AVERAGES) else "last"


def _store(file: str, target: str) -> None:
    """Raises ArtefactError when something else is there."""
    if storage.put_file_if_absent(target, file):
        return
    if checkpoints.file_entry(target, target) != checkpoints.file_entry(file, target):
        raise ArtefactError(f"output holds {target}, but it is something else than is exported. Use another output.")
