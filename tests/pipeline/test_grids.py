"""Pictures of grids and of maps."""

import numpy as np

from pipeline.grids import label_colors


def test_every_label_has_a_colour_of_its_own():
    ids = np.arange(256, dtype=np.uint8).reshape(16, 16, 1)
    colors = label_colors(ids)
    assert colors.shape == (16, 16, 3) and colors.dtype == np.uint8
    assert len(np.unique(colors.reshape(-1, 3), axis=0)) > 240
    first = colors.reshape(-1, 3)[:24].astype(int)
    distances = np.abs(first[:, None] - first[None]).sum(-1) + 999 * np.eye(24, dtype=int)
    assert distances.min() >= 30  # the few labels that most sets have are told apart by eye
