"""Metrics of reconstructions, image by image. Each maps two uint8 arrays (n, H, W, C) to float64 (n,)."""

from collections.abc import Callable

import numpy as np
import torch
from torchmetrics.functional.image import structural_similarity_index_measure

from evaluation.batches import padded_batches
from evaluation.label_metrics import pixel_accuracy
from evaluation.weights import PretrainedFile, load_pretrained, weights_fingerprint
from stages.errors import ArtefactError, ConfigError
from stages.first_stage.lpips import Lpips
from stages.first_stage.pixels import to_float
from stages.options import EvaluationOptions

PixelMetric = Callable[[np.ndarray, np.ndarray], np.ndarray]
# Identical images have no finite PSNR.
MAX_PSNR = 100.0


def psnr(images: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio in dB, at most 100."""
    error = images.astype(np.float64) - others.astype(np.float64)
    mean_square = np.mean(error**2, axis=(1, 2, 3))
    floor = 255.0**2 / 10 ** (MAX_PSNR / 10)
    return 10.0 * np.log10(255.0**2 / np.maximum(mean_square, floor))


def ssim(images: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Structural similarity, at most 1 (Wang et al. 2004): Gaussian window of 11 pixels and deviation 1.5, mean over
    all positions (borders mirrored) and channels."""
    if len(images) == 0:
        return np.empty(0)
    x, y = (torch.from_numpy(np.array(a)).permute(0, 3, 1, 2).double() for a in (images, others))
    values = structural_similarity_index_measure(x, y, data_range=255.0, reduction="none")
    assert isinstance(values, torch.Tensor)
    return values.reshape(-1).numpy()


class LpipsDistance:
    """LPIPS with VGG16 and the published heads (Zhang et al. 2018), at the images' own size.

    Raises:
        ConfigError, ArtefactError, TesseraError: the two files of weights are missing, damaged or cannot be fetched.
    """

    VGG = PretrainedFile(
        "vgg16-397923af.pth",
        "https://download.pytorch.org/models/vgg16-397923af.pth",
        "397923af",
        packaged_sha256="53d862a88bc633f92f329dab6b24e890c2d86d92f930849ab03b56727c3e280c",
    )
    HEADS = PretrainedFile(
        "weights-vgg16-lpips.pth",
        "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-vgg16-lpips.pth",
        "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868",
        packaged_sha256="8ca57a96a58c9fa4249181163ed6ddbb98876c22d0f322f7f7d5951b6ba9ce1b",
    )

    def __init__(self, options: EvaluationOptions):
        tensors = [load_pretrained(file, "lpips", options) for file in (self.VGG, self.HEADS)]
        try:
            network = Lpips(*tensors)
        except ConfigError as error:
            raise ArtefactError(
                f"{self.VGG.name} and {self.HEADS.name} do not hold LPIPS ({error}), but they must be the files published at "
                f"{self.VGG.url} and {self.HEADS.url}. Fetch them again."
            ) from error
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.network = network.to(self.device)
        self.fingerprint = weights_fingerprint(network, {"name": "lpips-vgg16"})

    @torch.inference_mode()
    def __call__(self, images: np.ndarray, others: np.ndarray) -> np.ndarray:
        values = []
        for n, batch in padded_batches(images, others):
            x, y = (to_float(torch.from_numpy(array)).to(self.device) for array in batch)
            values.append(self.network(x, y)[:n].double().cpu().numpy())
        return np.concatenate(values) if values else np.empty(0)


PIXEL_METRICS: dict[str, Callable[[EvaluationOptions], PixelMetric]] = {
    "psnr": lambda options: psnr,
    "ssim": lambda options: ssim,
    "lpips": LpipsDistance,
    "pixel_accuracy": lambda options: pixel_accuracy,
}
