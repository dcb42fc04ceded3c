"""The actor that turns images into features: samples it is sent, and real images it reads itself, with their
reconstructions."""

import logging
from collections.abc import Sequence

import numpy as np
import torch

from evaluation.extractors import open_extractor
from evaluation.tally import RealImages
from pipeline.shard_tasks import fetch
from pipeline.sources import Source
from pipeline.tokenizers import open_tokenizer
from pipeline.views import apply_view
from stages.errors import BadImage, TesseraError
from stages.first_stage.pixels import to_float, to_uint8
from stages.memory import keep_freed_memory
from stages.options import EvaluationOptions, ImageOptions

logger = logging.getLogger(__name__)

VIEW = "center"
# Identical images have no finite PSNR.
MAX_PSNR = 100.0


class FeatureActor:
    """Extractor and tokenizer, loaded once. Results do not depend on which actor computes them (fp32, CPU, equal
    `num_threads`).

    Args:
        source: where real images are read from.
        images: what is done to them before anything sees them.
        evaluation: names the extractor.
        tokenizer_path: the tokenizer that reconstructs.
        num_threads: torch threads.
    """

    def __init__(
        self,
        source: Source,
        images: ImageOptions,
        evaluation: EvaluationOptions,
        tokenizer_path: str,
        num_threads: int = 1,
    ):
        keep_freed_memory()
        torch.set_num_threads(num_threads)
        self.source = source
        self.images = images
        self.extractor = open_extractor(evaluation.extractor, evaluation.extractor_resolution)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.tokenizer = open_tokenizer(tokenizer_path).to(self.device)

    def of_images(self, images: np.ndarray, tiles: Sequence[int]) -> tuple[np.ndarray, dict[int, np.ndarray]]:
        """Features float32 (n, d) of images uint8 (n, H, W, C), and the images at the positions `tiles`."""
        return self.extractor(images), {position: images[position] for position in tiles}

    def of_reference(self, uris: Sequence[str]) -> tuple[np.ndarray, int]:
        """Features float32 (n, d) of the real images that can be used, and the number of those that cannot."""
        images, is_usable = self._read(uris)
        return self.extractor(images), int(np.sum(~is_usable))

    def of_holdout(
        self, uris: Sequence[str], labels: np.ndarray, tiles: Sequence[int]
    ) -> tuple[RealImages, np.ndarray, np.ndarray]:
        """Real images and their reconstructions; apart from them, codes int64 (n, L) and labels int64 (n,)."""
        images, is_usable = self._read(uris)
        codes, reconstructions = self._reconstruct(images)
        places = np.cumsum(is_usable) - 1
        item = RealImages(
            is_usable=is_usable,
            features=self.extractor(images),
            reconstruction_features=self.extractor(reconstructions),
            psnr=psnr(images, reconstructions),
            tiles={p: np.stack([images[places[p]], reconstructions[places[p]]]) for p in tiles if is_usable[p]},
        )
        return item, codes, labels[is_usable]

    def _read(self, uris: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Images uint8 (n, H, W, C) that can be used, and which can, bool (m,)."""
        views = [read_view(self.source, uri, self.images) for uri in uris]
        shape = (self.images.size, self.images.size, self.images.channels)
        usable = [view for view in views if view is not None]
        return np.stack(usable) if usable else np.empty((0, *shape), np.uint8), np.array(
            [view is not None for view in views]
        )

    @torch.inference_mode()
    def _reconstruct(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        grid = self.tokenizer.grid(self.images.size)
        if len(images) == 0:
            return np.empty((0, grid[0] * grid[1]), np.int64), images
        codes = self.tokenizer.encode(to_float(torch.from_numpy(images)).to(self.device))
        pixels = self.tokenizer.decode(codes.view(-1, *grid))
        return codes.cpu().numpy(), to_uint8(pixels).cpu().numpy()


def read_view(source: Source, uri: str, images: ImageOptions) -> np.ndarray | None:
    """The central view of one image, uint8 (size, size, C); None when its content cannot be used, which is logged.

    Raises:
        TesseraError: the storage failed several times.
    """
    try:
        return apply_view(source.decode(fetch(source, uri)).image, VIEW, images)
    except BadImage as error:
        logger.warning("%s cannot be used and is left out: %s", uri, error)
        return None
    except OSError as error:
        raise TesseraError(
            f"{uri} is listed, but it cannot be read ({error}). Restore the storage or connection."
        ) from error


def psnr(images: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio per image in dB, float64 (n,), of uint8 images (n, H, W, C); at most 100."""
    error = images.astype(np.float64) - others.astype(np.float64)
    mean_square = np.mean(error**2, axis=(1, 2, 3))
    floor = 255.0**2 / 10 ** (MAX_PSNR / 10)
    return 10.0 * np.log10(255.0**2 / np.maximum(mean_square, floor))
