"""Checkpoint files of other projects as named tensors, with nothing taken over or left out unsaid."""

import json
import logging
import os
import re
from dataclasses import dataclass, replace
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from stages.errors import ArtefactError, ConfigError
from stages.first_stage.artefact import MARKER, WEIGHTS, WEIGHTS_OF, is_artefact
from stages.first_stage.unpickle import read_checkpoint

logger = logging.getLogger(__name__)

DIFFUSERS_WEIGHTS = (  # the first of them that is in a folder
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.bin",
    "diffusion_pytorch_model.fp16.safetensors",
)
# Lightning; LlamaGen; LlamaGen under DeepSpeed; LlamaGen's averaged weights, which only some of its scripts load.
CONTAINERS = ("state_dict", "model", "module", "ema")
MAX_NAMED = 5
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.bool, *INTEGERS)
# What is told of files that are no other project's.
OWN = {
    "artefact": "is of a tokenizer artefact, but only files of other projects are imported. Use the artefact as it is: set "
    "tokenizer.path to its folder.",
    "training": "is of a commit of train-tokenizer, but its weights belong to that training, and only files of other projects are "
    "imported. Let train-tokenizer end and set tokenizer.path to the folder of the artefact that it writes.",
}


@dataclass(frozen=True)
class Foreign:
    """The tensors of a checkpoint, or of a part of it.

    Attributes:
        path: the file, for messages.
        tensors: by their names there.
        marker: what an export of ours wrote beside them.
    """

    path: str
    tensors: dict[str, Tensor]
    marker: dict[str, Any]

    def has(self, prefix: str) -> bool:
        """Whether any name starts like this."""
        return any(name.startswith(prefix) for name in self.tensors)

    def part(self, prefix: str) -> "Foreign":
        """The tensors whose names start with `prefix`, without it."""
        kept = {name.removeprefix(prefix): t for name, t in self.tensors.items() if name.startswith(prefix)}
        return replace(self, tensors=kept)

    def without(self, kinds: dict[str, str]) -> "Foreign":
        """Leaves out tensors whose names match, and says so.

        Args:
            kinds: what they are, by the pattern of their names.
        """
        left: dict[str, list[str]] = {}
        for name in self.tensors:
            kind = next((kind for pattern, kind in kinds.items() if re.match(pattern, name)), None)
            if kind is not None:
                left.setdefault(kind, []).append(name)
        if left:
            counts = ", ".join(f"{len(names)} of {kind} ({name_some(names, 1)})" for kind, names in left.items())
            logger.info("Left out of %s: %s", self.path, counts)
        dropped = {name for names in left.values() for name in names}
        return replace(self, tensors={name: t for name, t in self.tensors.items() if name not in dropped})

    def checked(self) -> "Foreign":
        """Itself.

        Raises:
            ArtefactError: something is no tensor, is one of another kind than weights are, or has values that are not finite.
        """
        strays = [name for name, value in self.tensors.items() if not isinstance(value, Tensor)]
        if strays:
            raise ArtefactError(
                f"{self.path} has {name_some(strays)}, but every weight must be a tensor. Choose the file of the weights."
            )
        odd = [name for name, value in self.tensors.items() if not _is_plain(value)]
        if odd:
            example = self.tensors[odd[0]]
            raise ArtefactError(
                f"{self.path} has {name_some(odd)} as {example.layout}, {example.dtype} on {example.device}, but weights must be dense, "
                "of real numbers, and stored whole. Choose the file that the model was published in."
            )
        broken = [name for name, value in self.tensors.items() if not value.float().isfinite().all()]
        if broken:
            raise ArtefactError(
                f"{self.path} has {name_some(broken)} with values that are not finite, but weights must be. Fetch it again."
            )
        return self


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor has an element of an ordinary type in memory for each of its indices."""
    if tensor.layout != torch.strided or tensor.is_nested or tensor.device.type != "cpu" or tensor.dtype not in DTYPES:
        return False
    # A stride of 0 makes terabytes of a few bytes.
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def read_foreign(file: str) -> Foreign:
    """Everything a checkpoint file, or a diffusers folder, calls a weight. Nothing in it is executed.

    Raises:
        ConfigError: no such file.
        ArtefactError: damaged or hostile, or a tokenizer of this project's own.
    """
    path = _weights_file(file)
    content = read_checkpoint(path)
    marker = _read_marker(content, path)
    _refuse_own(path, marker)
    taken = next((key for key in CONTAINERS if isinstance(content.get(key), dict)), None)
    nested = content if taken is None else content[taken]
    left = [str(name) for name, value in content.items() if isinstance(value, dict) and name not in (taken, MARKER)]
    if taken is not None and left:
        logger.info("Taken from %s: the weights called %s. Left out: %s", path, taken, ", ".join(left))
    tensors = {str(name): value for name, value in nested.items() if name != MARKER}
    return Foreign(path, tensors, marker)


def name_some(names: Any, most: int = MAX_NAMED) -> str:
    """The first few of some names, and how many more there are."""
    listed = list(names)
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more


def _weights_file(file: str) -> str:
    if os.path.isdir(file):
        candidates = [os.path.join(file, name) for name in DIFFUSERS_WEIGHTS]
        path = next((candidate for candidate in candidates if os.path.exists(candidate)), None)
        if path is None and is_artefact(file):
            raise ArtefactError(f"{file} {OWN['artefact']}")
        if path is None:
            raise ConfigError(
                f"file is {file}, but this folder has none of {', '.join(DIFFUSERS_WEIGHTS)}. Name the file itself."
            )
        return path
    if not os.path.exists(file):
        raise ConfigError(f"file is {file}, but there is no such file. Check the path.")
    return file


def _refuse_own(path: str, marker: dict[str, Any]) -> None:
    """Refuses weights that this project stores under the names of CompVis, but with norms and codes that need not be CompVis'."""
    kind = marker.get(WEIGHTS_OF)
    folder, name = os.path.split(path)
    if kind is None and name == WEIGHTS and is_artefact(folder):  # of a version that did not mark its weights
        kind = "artefact"
    if kind is not None:
        raise ArtefactError(f"{path} {OWN.get(kind, OWN['artefact'])}")


def _read_marker(content: dict[str, Any], path: str) -> dict[str, Any]:
    if path.endswith(".safetensors"):
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(MARKER, "{}")
        try:
            marker = json.loads(text)
        except json.JSONDecodeError as error:
            raise ArtefactError(
                f"{path} has damaged metadata ({error}), but {MARKER} must be JSON. Export it again."
            ) from None
    else:
        marker = content.get(MARKER, {})
    if not _is_marker(marker):
        raise ArtefactError(
            f"{path} has {MARKER} {marker}, but resolutions and groups must be positive integers. Export it again."
        )
    return marker


def _is_marker(marker: Any) -> bool:
    if not isinstance(marker, dict) or not isinstance(marker.get("attention_resolutions", ()), list | tuple):
        return False
    if not isinstance(marker.get(WEIGHTS_OF, ""), str):
        return False
    numbers = [marker.get("resolution", 1), marker.get("num_norm_groups", 1), *marker.get("attention_resolutions", ())]
    return all(type(number) is int and number > 0 for number in numbers)
