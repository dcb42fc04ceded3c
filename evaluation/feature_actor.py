"""The actor that turns images into features: samples it is sent, and real images it reads itself, with their
reconstructions."""

import logging
from collections.abc import Sequence
from itertools import compress

import numpy as np
import torch

from evaluation.batches import padded_batches
from evaluation.extractors import open_extractor
from evaluation.label_metrics import overlaps
from evaluation.metrics import FeatureKey, MetricPlan
from evaluation.pixel_metrics import PIXEL_METRICS
from evaluation.self_test import damaged
from evaluation.set_metric import HOLDOUT, RECONSTRUCTIONS, SAMPLES
from evaluation.set_tally import Features
from evaluation.tally import RealImages
from pipeline.encoding import prepare_tokenizer, use_parity_mode
from pipeline.fetch import fetch
from pipeline.grids import label_colors
from pipeline.inputs import input_channels, render_views
from pipeline.sources import Source
from pipeline.tokenizers import open_tokenizer
from pipeline.views import crop_of
from stages.errors import BadImage, TesseraError
from stages.first_stage.pixels import from_output, to_input
from stages.memory import keep_freed_memory
from stages.options import EvaluationOptions, ImageOptions, TokenizerOptions

logger = logging.getLogger(__name__)

VIEW = "center"


class FeatureActor:
    """Extractors and tokenizer, loaded once. Results do not depend on which actor computes them (fp32, CPU).

    Args:
        source: where real images are read from.
        images: what is done to them before anything sees them.
        evaluation: how extractors are opened.
        plan: which of their outputs are needed.
        tokenizer: the tokenizer that reconstructs, and what of the images; None where nothing is reconstructed.
    """

    def __init__(
        self,
        source: Source,
        images: ImageOptions,
        evaluation: EvaluationOptions,
        plan: MetricPlan,
        tokenizer: TokenizerOptions | None,
    ):
        keep_freed_memory()
        torch.set_num_threads(1)  # sums over more round otherwise
        self.source = source
        self.images = images
        self.options = tokenizer or TokenizerOptions()
        self.plan = plan
        self.extractors = {name: open_extractor(name, evaluation) for name in plan.extractors()}
        self.pixel_metrics = {name: PIXEL_METRICS[name](evaluation) for name in plan.pixels}
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        use_parity_mode()  # for the extractors too
        self.tokenizer = prepare_tokenizer(open_tokenizer(tokenizer.path), self.device) if tokenizer else None

    def of_images(self, images: np.ndarray, tiles: Sequence[int]) -> tuple[Features, dict[int, np.ndarray]]:
        """Features of samples uint8 (n, H, W, C), and the images at the positions `tiles`."""
        return self._features(images, self.plan.features_of(SAMPLES)), {position: images[position] for position in tiles}

    def of_reference(self, uris: Sequence[str], keys: Sequence[FeatureKey]) -> tuple[Features, np.ndarray, dict[str, str]]:
        """Features under these keys of the real images that can be used, which can, bool (m,), and the fingerprints of the extractors,
        by name."""
        images, is_usable = self._read(uris)
        return self._features(images, keys), is_usable, {name: self.extractors[name].fingerprint for name, _ in keys}

    def of_damaged(self, uris: Sequence[str], keys: Sequence[FeatureKey]) -> Features:
        """Features of the real images that can be used, after they were damaged (see `evaluation.self_test`)."""
        return self._features(damaged(self._read(uris)[0]), keys)

    def of_holdout(
        self, uris: Sequence[str], labels: np.ndarray, tiles: Sequence[int]
    ) -> tuple[RealImages, np.ndarray, np.ndarray]:
        """Real images, or maps of them, and their reconstructions; apart from them, codes int64 (n, L) and the labels of usable ones:
        classes int64 (n,), or codes of a condition int64 (n, P)."""
        images, is_usable = self._read(uris)
        codes, reconstructions = self._reconstruct(images)
        places, num_labels = np.cumsum(is_usable) - 1, self.options.num_labels
        pairs = {p: np.stack([images[places[p]], reconstructions[places[p]]]) for p in tiles if is_usable[p]}
        item = RealImages(
            is_usable=is_usable,
            features=self._features(images, self.plan.features_of(HOLDOUT)),
            reconstruction_features=self._features(reconstructions, self.plan.features_of(RECONSTRUCTIONS)),
            pixels={name: metric(images, reconstructions) for name, metric in self.pixel_metrics.items()},
            tiles={p: pair if num_labels is None else label_colors(pair) for p, pair in pairs.items()},
            overlaps=overlaps(images, reconstructions, num_labels) if self.plan.has_mean_iou and num_labels else None,
        )
        return item, codes, labels[is_usable]

    def pictures(self, uris: Sequence[str]) -> dict[str, np.ndarray]:
        """The real images that can be used, uint8 (H, W, C), by uri."""
        images, is_usable = self._read(uris)
        return dict(zip(compress(uris, is_usable), images, strict=True))

    def _features(self, images: np.ndarray, keys: Sequence[FeatureKey]) -> Features:
        """Features float32 (n, d) of images uint8 (n, H, W, C) under these keys; every extractor runs once."""
        found: dict[FeatureKey, np.ndarray] = {}
        for name in dict.fromkeys(name for name, _ in keys):
            outputs = [output for extractor, output in keys if extractor == name]
            found |= {(name, output): values for output, values in self.extractors[name](images, outputs).items()}
        return found

    def _read(self, uris: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Images uint8 (n, H, W, C) that can be used, or maps of them, and which can, bool (m,)."""
        views = [read_view(self.source, uri, self.images, self.options) for uri in uris]
        shape = (self.images.size, self.images.size, input_channels(self.images, self.options))
        usable = [view for view in views if view is not None]
        return np.stack(usable) if usable else np.empty((0, *shape), np.uint8), np.array(
            [view is not None for view in views]
        )

    @torch.inference_mode()
    def _reconstruct(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        assert self.tokenizer is not None, "this actor was made to reconstruct nothing"
        grid = self.tokenizer.grid(self.images.size)
        codes, reconstructions = [np.empty((0, grid[0] * grid[1]), np.int64)], [images[:0]]
        for n, (batch,) in padded_batches(images):
            codes_BL = self.tokenizer.encode(to_input(torch.from_numpy(batch).to(self.device), self.options.num_labels))
            outputs = self.tokenizer.decode(codes_BL.view(-1, *grid))
            codes.append(codes_BL[:n].cpu().numpy())
            reconstructions.append(from_output(outputs, self.options.num_labels)[:n].cpu().numpy())
        return np.concatenate(codes), np.concatenate(reconstructions)


def read_view(source: Source, uri: str, images: ImageOptions, tokenizer: TokenizerOptions) -> np.ndarray | None:
    """The central view of what is tokenized of one image, uint8 (size, size, C); None when it cannot be used, which is logged.

    Raises:
        TesseraError: the storage failed several times.
    """
    try:
        example = source.decode(fetch(source, uri))
        crop = crop_of(VIEW, 0, *example.image.shape[:2])
        return render_views(example, [crop], images, tokenizer, uri)[0]
    except BadImage as error:
        logger.warning("%s cannot be used and is left out: %s", uri, error)
        return None
    except OSError as error:
        raise TesseraError(
            f"{uri} is listed, but it cannot be read ({error}). Restore the storage or connection."
        ) from error
