"""Reads published checkpoints without running what is in them.

Checkpoints are often pickles, and a pickle can call any function when it is loaded. Here only the functions that
rebuild tensors are ever called; classes of training frameworks, which such files carry along, become empty objects;
anything else is refused.
"""

import collections
import functools
import pickle
import struct
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from stages.errors import ArtefactError

FUNCTIONS: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
}
CLASSES = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch", "Size"): torch.Size,
    ("torch", "device"): torch.device,
}
# Never looked into: optimizer states, hyperparameters, callbacks, counters.
STUBBED_PACKAGES = {
    "argparse",
    "ldm",
    "lightning",
    "lightning_fabric",
    "lightning_utilities",
    "numpy",
    "omegaconf",
    "pathlib",
    "pytorch_lightning",
    "taming",
    "typing",
}
STUBBED_NAMES = {
    ("_codecs", "encode"),
    ("collections", "Counter"),
    ("collections", "defaultdict"),
    ("copyreg", "_reconstructor"),
    *(
        ("builtins", name)
        for name in ("set", "frozenset", "list", "dict", "tuple", "int", "float", "str", "bool", "complex", "slice")
    ),
}
# Protocol 2, which torch.save writes, uses the names of Python 2.
PYTHON_2_MODULES = {"__builtin__": "builtins", "copy_reg": "copyreg"}
# What torch.load and safetensors raise on files that are cut off, altered or of another kind.
BROKEN = (
    SafetensorError,
    pickle.UnpicklingError,
    OSError,
    RuntimeError,
    EOFError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    AssertionError,
    OverflowError,
    MemoryError,
    struct.error,
)


class _Stub:
    """Takes whatever a pickle gives to an object, and keeps none of it."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "_Stub":
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        """Drops a list item."""

    def extend(self, values: Any) -> None:
        """Drops list items."""

    def add(self, value: Any) -> None:
        """Drops a set item."""


class _Refused(pickle.UnpicklingError):
    """The pickle asks for something that no checkpoint needs."""


class RestrictedUnpickler(pickle.Unpickler):
    """An unpickler that knows tensors and ordered dicts, and nothing that acts; torch.load finds the storages."""

    def find_class(self, module: str, name: str) -> Any:
        """The object a pickle names: from the list of allowed ones, or a stub.

        Raises:
            UnpicklingError: neither.
        """
        module = PYTHON_2_MODULES.get(module, module)
        if (module, name) in CLASSES:
            return CLASSES[module, name]
        if (module, name) in FUNCTIONS:
            # A pickle may set attributes of what it gets, so it gets no function that others call.
            return functools.partial(FUNCTIONS[module, name])
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if module.split(".")[0] in STUBBED_PACKAGES or (module, name) in STUBBED_NAMES:
            return type(name.split(".")[-1], (_Stub,), {})
        raise _Refused(f"{module}.{name}")


def read_checkpoint(path: str) -> dict[str, Any]:
    """The content of a .safetensors file, or of a checkpoint that torch.save or Lightning wrote; tensors on the CPU.

    Raises:
        ArtefactError: not such a file, damaged, or with content that would run code.
    """
    try:
        content = load_file(path) if path.endswith(".safetensors") else _load_pickled(path)
    except _Refused as error:
        raise ArtefactError(
            f"{path} asks for {error}, but a checkpoint may hold only tensors and plain values. "
            "Nothing of it was run; do not trust this file."
        ) from None
    except BROKEN as error:
        reason = str(error).partition("\n")[0]
        raise ArtefactError(
            f"{path} cannot be read ({type(error).__name__}: {reason}), but it must be a checkpoint as torch.save or "
            "safetensors write it. Check that the file is whole."
        ) from error
    if not isinstance(content, dict):
        raise ArtefactError(
            f"{path} holds a {type(content).__name__}, but a checkpoint must be a dict of tensors. Choose another file."
        )
    return content


def _load_pickled(path: str) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        # Only a class that torch does not know ends here. A TorchScript archive, which the call below would run, fails
        # the call above with RuntimeError.
        return torch.load(path, map_location="cpu", weights_only=False, pickle_module=_RESTRICTED)


def _load(file: Any, **kwargs: Any) -> Any:
    return RestrictedUnpickler(file, **kwargs).load()


# What torch.load needs of the pickle module.
_RESTRICTED = SimpleNamespace(Unpickler=RestrictedUnpickler, load=_load, __name__="restricted")
