"""torch-fidelity's networks as numeric oracle, as they are on PyPI.

The Makefile installs the package without its dependencies into `.venv/oracles`, which is on no import path: where torchmetrics
finds torch-fidelity, it imports it, and with it torchvision. Here single modules of it are imported, without the package's own
`__init__`, and nothing of them stays importable.
"""

import functools
import importlib
import os
import sys
from types import ModuleType

import pytest

FOLDER = os.environ.get("TESSERA_ORACLES", os.path.join(sys.prefix, "oracles"))
PACKAGE, STAND_IN = "torch_fidelity", "torchvision"


@functools.cache
def fidelity(name: str) -> ModuleType:
    """The module `torch_fidelity.NAME`, with an empty stand-in for torchvision. Skips the test where it is not installed."""
    folder = os.path.join(FOLDER, PACKAGE)
    if not os.path.isdir(folder):
        pytest.skip(f"needs {PACKAGE} in {FOLDER}: make .venv/.dev")
    package = ModuleType(PACKAGE)
    package.__path__ = [folder]
    sys.modules[PACKAGE] = package
    is_missing = STAND_IN not in sys.modules
    if is_missing:
        sys.modules[STAND_IN] = ModuleType(STAND_IN)
    try:
        return importlib.import_module(f"{PACKAGE}.{name}")
    finally:
        for module in [module for module in sys.modules if module.partition(".")[0] == PACKAGE]:
            del sys.modules[module]
        if is_missing:
            del sys.modules[STAND_IN]
