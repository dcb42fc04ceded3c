import numpy as np
import pytest

from evaluation.self_test import check_extractor, damaged
from stages.errors import TesseraError


def images(n: int, seed: int) -> np.ndarray:
    smooth = np.random.default_rng(seed).integers(60, 200, (n, 1, 1, 3)) + np.zeros((n, 8, 8, 3))
    return smooth.astype(np.uint8)


def roughness(pictures: np.ndarray) -> np.ndarray:
    """A feature that sees damage: mean and steps between neighbours, float32 (n, 6)."""
    x = pictures.astype(np.float32)
    return np.concatenate([x.mean((1, 2)), np.abs(np.diff(x, axis=1)).mean((1, 2))], axis=1)


def test_damage_is_strong_and_always_the_same():
    pictures = images(4, 0)
    assert np.abs(damaged(pictures).astype(int) - pictures).mean() > 20
    np.testing.assert_array_equal(damaged(pictures), damaged(pictures))


def test_what_sees_damage_passes_and_what_sees_nothing_does_not():
    real, other = images(40, 0), images(40, 1)
    found = check_extractor("x", roughness(real), roughness(other), roughness(damaged(other)))
    assert found["damaged"] > 10 * found["real"] >= 0 and found["num_images"] == 40
    for blind in (lambda x: np.ones((len(x), 6), np.float32), lambda x: x.mean((1, 2), dtype=np.float32)):
        with pytest.raises(TesseraError, match="Extractor x puts real images .* Check its weights .* More than 40 images"):
            check_extractor("x", blind(real), blind(other), blind(damaged(other)))
