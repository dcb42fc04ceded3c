"""A guard against extractors that see nothing: real images must be nearer to other real images than to damaged ones.

Random or half-loaded weights give small distances to everything, which look like excellent ones.
"""

import numpy as np

from evaluation.frechet import Reference, frechet_distance
from evaluation.statistics import GaussianStatistics
from stages.errors import TesseraError

NUM_IMAGES = 128
LEAST_RATIO = 1.2
NOISE = 64.0


def damaged(images: np.ndarray) -> np.ndarray:
    """Images uint8 (n, H, W, C) under strong noise, the same for the same number and shape of images."""
    noise = np.random.Generator(np.random.Philox(key=0)).normal(scale=NOISE, size=images.shape)
    return np.clip(images + noise, 0, 255).astype(np.uint8)


def check_extractor(name: str, real: np.ndarray, other: np.ndarray, damaged_other: np.ndarray) -> dict[str, float]:
    """Fréchet distances of real images to other real ones, and to these damaged.

    Args:
        name: of the extractor, for the error.
        real, other, damaged_other: float32 features (n, d) of two halves of real images, and of the second one damaged.

    Raises:
        TesseraError: the damage does not show.
    """
    reference = Reference.of(GaussianStatistics.of(real))
    to_real, to_damaged = (frechet_distance(GaussianStatistics.of(f), reference) for f in (other, damaged_other))
    if not to_damaged > LEAST_RATIO * to_real:
        more = "" if len(real) >= NUM_IMAGES else f" More than {len(real)} images of each tell better, up to {NUM_IMAGES}."
        raise TesseraError(
            f"Extractor {name} puts real images {to_damaged:.4g} from damaged ones and {to_real:.4g} from other real "
            f"ones, but the first must be at least {LEAST_RATIO} times the second. Check its weights and the images.{more}"
        )
    return {"real": to_real, "damaged": to_damaged, "num_images": float(len(real))}
