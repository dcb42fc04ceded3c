"""The original implementations as numeric oracles: CompVis/taming-transformers and diffusers, as they are on PyPI.

The Makefile installs both without their dependencies into `.venv/oracles`, which is on no import path until a test asks for one of
them: transformers and torchvision, which they would bring, must not be importable beside torchmetrics. What taming-transformers
imports and does not need for its networks is replaced by stand-ins while it is imported.
"""

import functools
import importlib
import os
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

FOLDER = os.environ.get("TESSERA_ORACLES", os.path.join(sys.prefix, "oracles"))
LPIPS_HEADS = os.path.join(FOLDER, "lpips", "weights", "v0.1", "vgg.pth")  # the file that the original code downloads
VGG16 = (64, 64, "pool", 128, 128, "pool", 256, 256, 256, "pool", 512, 512, 512, "pool", 512, 512, 512, "pool")


def taming(name: str) -> ModuleType:
    """The module `taming.NAME` of taming-transformers-rom1504, such as `models.vqgan`. Skips the test where it is not installed.

    `LPIPS()` has the published linear heads on a VGG16 with random weights.
    """
    _stand_ins()
    return importlib.import_module(f"taming.{name}")


def diffusers_vq_model() -> Any:
    """diffusers' `VQModel` class. Skips the test where it is not installed."""
    _require("diffusers")
    return importlib.import_module("diffusers.models.autoencoders.vq_model").VQModel


def _require(package: str) -> None:
    if not os.path.isdir(os.path.join(FOLDER, package)):
        pytest.skip(f"needs {package} in {FOLDER}: make .venv/.dev")
    if FOLDER not in sys.path:
        sys.path.append(FOLDER)


@functools.cache
def _stand_ins() -> None:
    """Imports the modules whose own imports are missing; the stand-ins are gone again afterwards."""
    _require("taming")
    lightning = _module("pytorch_lightning", LightningModule=nn.Module)
    transformers = _module("transformers", top_k_top_p_filtering=top_k_top_p_filtering)
    models = _module("torchvision.models", vgg16=_vgg16)
    stand_ins = [lightning, transformers, models, _module("torchvision", models=models)]
    missing = [module for module in stand_ins if module.__name__ not in sys.modules]
    sys.modules["taming.main"] = _module("taming.main", instantiate_from_config=_instantiate)
    sys.modules.update({module.__name__: module for module in missing})
    try:
        for name in ("modules.losses.lpips", "modules.transformer.mingpt", "models.vqgan", "models.cond_transformer"):
            importlib.import_module(f"taming.{name}")
    finally:
        for module in missing:
            del sys.modules[module.__name__]
    importlib.import_module("taming.modules.losses.lpips").get_ckpt_path = lambda *args, **kwargs: LPIPS_HEADS  # type: ignore


def _module(name: str, **content: Any) -> ModuleType:
    module = ModuleType(name)
    module.__dict__.update(content)
    return module


def _instantiate(config: dict[str, Any]) -> Any:
    module, _, name = config["target"].rpartition(".")
    return getattr(importlib.import_module(module), name)(**config.get("params", {}))


def _vgg16(pretrained: bool) -> nn.Module:
    layers, width = [], 3
    for entry in VGG16:
        if isinstance(entry, str):
            layers.append(nn.MaxPool2d(2))
        else:
            layers += [nn.Conv2d(width, entry, 3, padding=1), nn.ReLU(inplace=True)]
            width = entry
    network = nn.Module()
    network.features = nn.Sequential(*layers)
    return network


def top_k_top_p_filtering(logits_BV: Tensor, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """What transformers offered under this name until version 4.38: top-k, ties kept, then the nucleus of the rest."""
    if top_k > 0:
        kth_B1 = logits_BV.topk(min(top_k, logits_BV.shape[-1])).values[:, -1:]
        logits_BV = torch.where(logits_BV < kth_B1, -torch.inf, logits_BV)
    if top_p < 1.0:
        values_BV, order_BV = logits_BV.sort(descending=True)
        p_BV = values_BV.softmax(-1)
        is_out_BV = torch.zeros_like(logits_BV, dtype=torch.bool).scatter(-1, order_BV, p_BV.cumsum(-1) - p_BV > top_p)
        logits_BV = logits_BV.masked_fill(is_out_BV, -torch.inf)
    return logits_BV
