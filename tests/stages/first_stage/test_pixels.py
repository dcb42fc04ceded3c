"""Pixels and label maps on their way into the networks and out of them."""

import torch

from stages.first_stage.pixels import from_output, to_float, to_input, to_uint8


def test_labels_survive_the_way_to_channels_and_back():
    ids = torch.randint(0, 7, (2, 5, 4, 1), dtype=torch.uint8)
    back = from_output(10 * to_input(ids, 7) - 3, 7)
    assert back.dtype == torch.uint8 and torch.equal(back, ids)


def test_pixels_survive_the_way_to_floats_and_back():
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1)
    floats = to_float(pixels)
    assert floats.min() == -1 and floats.max() == 1
    assert (to_uint8(floats).int() - pixels.int()).abs().max() <= 1  # the original truncates
    assert torch.equal(to_uint8(torch.tensor([[[[-3.0, 3.0]]]])), torch.tensor([[[[0], [255]]]], dtype=torch.uint8))
