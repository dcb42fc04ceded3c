"""Usage, perplexity and entropy of code counts."""

import pytest
import torch

from stages.first_stage.quantizers.health import codebook_health


@pytest.mark.parametrize(
    "counts, expected",
    [
        ([5, 5, 0, 0], (0.5, 2.0, 1.0)),
        ([1] * 8, (1.0, 8.0, 3.0)),
        ([0] * 8, (0.0, 1.0, 0.0)),
        ([0, 7], (0.5, 1.0, 0.0)),
        ([3, 1], (1.0, 1.7548, 0.8113)),
    ],
)
def test_of_known_distributions(counts, expected):
    assert tuple(codebook_health(torch.tensor(counts))) == pytest.approx(expected, abs=1e-4)
