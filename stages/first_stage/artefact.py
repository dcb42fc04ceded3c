"""The tokenizer on disk: `tokenizer.safetensors` and, written last, `config.json` with the fingerprint of both."""

import hashlib
import json
import os
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from stages.config import build
from stages.errors import ArtefactError
from stages.first_stage.tokenizer import Tokenizer
from stages.first_stage.tokenizer_config import TokenizerConfig

WEIGHTS, CONFIG = "tokenizer.safetensors", "config.json"
FORMAT, FORMAT_VERSION = "tessera-tokenizer", 1
MARKER = "tessera"  # what files of ours say beside their tensors; other readers pass over it
WEIGHTS_OF = "weights_of"  # there, in files that are not for other projects
HEADER = ("format", "format_version", "fingerprint")


def fingerprint(tokenizer: Tokenizer) -> str:
    """sha-256 over the architecture and every tensor (name, shape, float32 little-endian bytes) in name order."""
    digest = hashlib.sha256(json.dumps(tokenizer.config.identity(), sort_keys=True).encode())
    for name, tensor in sorted(tokenizer.state_dict().items()):
        values = tensor.detach().to("cpu", torch.float32).contiguous()
        digest.update(f"{name}:{tuple(values.shape)}".encode())
        digest.update(values.numpy().astype("<f4", copy=False).tobytes())
    return digest.hexdigest()


def encode_artefact(tokenizer: Tokenizer) -> dict[str, bytes]:
    """The files of the artefact of a tokenizer by name, in the order in which they are to be written."""
    baked = tokenizer.baked()
    tensors = {name: tensor.detach().to("cpu", torch.float32).contiguous() for name, tensor in baked.state_dict().items()}
    content = {"format": FORMAT, "format_version": FORMAT_VERSION, "fingerprint": fingerprint(baked), **baked.config.identity()}
    return {WEIGHTS: save(tensors, own_metadata("artefact")), CONFIG: json.dumps(content, indent=2).encode()}


def own_metadata(kind: Literal["artefact", "training"]) -> dict[str, str]:
    """What a safetensors file says so that it is not taken for another project's, whose tensors have the same names.

    It is one entry: of several, safetensors writes the order at random, and artefacts in a store are compared byte by byte.
    """
    return {MARKER: json.dumps({WEIGHTS_OF: kind})}


def is_artefact(folder: str) -> bool:
    """Whether a local folder is that of a tokenizer artefact, of whatever version and whether or not it is whole."""
    try:
        with open(os.path.join(folder, CONFIG), encoding="utf-8") as file:
            content = json.load(file)
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.get("format") == FORMAT


def read_config(folder: str) -> dict:
    """The stored configuration with its fingerprint.

    Raises:
        ArtefactError: there is no finished tokenizer here, or one of an unknown format.
    """
    path = os.path.join(folder, CONFIG)
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except FileNotFoundError:
        raise ArtefactError(
            f"tokenizer.path is {folder}, but there is no {CONFIG} in it. Run train-tokenizer or import-tokenizer first."
        ) from None
    except ValueError as error:
        raise ArtefactError(
            f"{path} is damaged ({error}), but it must be JSON. Restore or re-create the tokenizer."
        ) from None
    if (
        not isinstance(content, dict)
        or content.get("format") != FORMAT
        or content.get("format_version") != FORMAT_VERSION
        or not isinstance(content.get("fingerprint"), str)
    ):
        raise ArtefactError(
            f"{path} is not a tokenizer of format version {FORMAT_VERSION}, but it must be. Re-create the tokenizer."
        )
    return content


def architecture(content: dict) -> TokenizerConfig:
    """The architecture in what `read_config` returns. Raises ValueError or TypeError: it is none."""
    return build(TokenizerConfig, {name: value for name, value in content.items() if name not in HEADER})


def load_tokenizer(folder: str) -> Tokenizer:
    """The tokenizer in a local folder, in eval mode, with its fingerprint recomputed and compared.

    Raises:
        ArtefactError: missing, unfinished or damaged.
    """
    content = read_config(folder)
    try:
        tokenizer = Tokenizer(architecture(content))
        tokenizer.load_state_dict(load_file(os.path.join(folder, WEIGHTS)))
    except (TypeError, RuntimeError, OSError, ValueError, LookupError, ArithmeticError, SafetensorError) as error:
        raise ArtefactError(
            f"{folder} is a damaged tokenizer ({error}), but it must load strictly. Re-create it."
        ) from error
    found = fingerprint(tokenizer)
    if found != content["fingerprint"]:
        raise ArtefactError(
            f"{folder} is a damaged tokenizer: its fingerprint is {content['fingerprint']}, but its tensors give {found}."
        )
    tokenizer.fingerprint = found
    return tokenizer.eval().requires_grad_(False)
