"""Winograd's convolution beside the direct one in float64, and what is left to the direct one."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tests_support import TINY_TOKENIZER
from torch import nn

from pipeline import winograd
from pipeline.winograd import WinogradConv2d, convolve, transform_kernel, use_winograd
from stages.first_stage.tokenizer import Tokenizer

WIDE = 2 * winograd.MIN_CHANNELS


def features(*shape):
    return torch.randn(shape).to(memory_format=torch.channels_last)


def relative_error(found, expected):
    return float((found.double() - expected).norm() / expected.norm())


@given(
    num_images=st.integers(1, 3),
    channels=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    tiles=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    strip_values=st.sampled_from([1, 256, 1 << 15]),
    seed=st.integers(0, 99),
)
@settings(max_examples=60)
def test_it_is_the_convolution(num_images, channels, tiles, strip_values, seed):
    torch.manual_seed(seed)
    c, k = channels
    x, weight, bias = features(num_images, c, 2 * tiles[0], 2 * tiles[1]), torch.randn(k, c, 3, 3), torch.randn(k)
    expected = F.conv2d(x.double(), weight.double(), bias.double(), padding=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(winograd, "STRIP_VALUES", strip_values)
        found = convolve(x, transform_kernel(weight), bias)
    assert found.shape == expected.shape and found.is_contiguous(memory_format=torch.channels_last)
    assert relative_error(found, expected) < 1e-6


def test_it_is_as_exact_as_the_direct_sum():
    torch.manual_seed(0)
    conv = nn.Conv2d(WIDE, WIDE, 3, padding=1).requires_grad_(False)
    x = F.silu(features(2, WIDE, 32, 32))
    expected = F.conv2d(x.double(), conv.weight.double(), conv.bias.double(), padding=1)
    with torch.no_grad():
        assert relative_error(WinogradConv2d(conv)(x), expected) < 1.5 * relative_error(conv(x), expected)


def is_direct(x, monkeypatch, **arguments):
    """Whether a replaced convolution leaves this input to the direct one, and gives what that gives."""
    torch.manual_seed(1)
    conv = nn.Conv2d(x.shape[1], WIDE, 3, padding=1, **arguments)
    used = []
    monkeypatch.setattr(winograd, "convolve", lambda *given: used.append(given) or convolve(*given))
    found = WinogradConv2d(conv)(x)
    torch.testing.assert_close(found, conv(x), rtol=1e-3, atol=1e-3)
    return not used


def test_only_frozen_float32_on_a_cpu_in_pairs_of_rows_and_columns_goes_this_way(monkeypatch):
    x = features(1, WIDE, 8, 8)
    assert is_direct(x, monkeypatch), "gradients"
    with torch.inference_mode():
        assert not is_direct(x, monkeypatch)
        assert is_direct(features(1, WIDE, 7, 8), monkeypatch), "odd height"
        assert is_direct(features(1, WIDE, 8, 7), monkeypatch), "odd width"
        assert is_direct(x.contiguous(), monkeypatch), "layout"
        assert is_direct(x.double(), monkeypatch, dtype=torch.float64), "float64"
        with torch.autocast("cpu", torch.bfloat16):
            assert is_direct(x, monkeypatch), "autocast"


def test_only_wide_3x3_convolutions_are_replaced_and_names_stay():
    convs = {
        "replaced": nn.Conv2d(WIDE, WIDE, 3, padding=1),
        "strided": nn.Conv2d(WIDE, WIDE, 3, padding=1, stride=2),
        "unpadded": nn.Conv2d(WIDE, WIDE, 3),
        "grouped": nn.Conv2d(WIDE, WIDE, 3, padding=1, groups=2),
        "pointwise": nn.Conv2d(WIDE, WIDE, 1),
        "narrow": nn.Conv2d(winograd.MIN_CHANNELS - 1, WIDE, 3, padding=1),
    }
    network = nn.Sequential(nn.ModuleDict(convs))
    before = {name: weight.data_ptr() for name, weight in network.state_dict().items()}
    for _ in range(2):
        use_winograd(network)
    assert [name for name, conv in network[0].items() if isinstance(conv, WinogradConv2d)] == ["replaced"]
    assert {name: weight.data_ptr() for name, weight in network.state_dict().items()} == before


def test_a_tokenizer_keeps_its_fingerprint(monkeypatch):
    monkeypatch.setattr(winograd, "MIN_CHANNELS", 1)
    tokenizer = Tokenizer(TINY_TOKENIZER).eval()
    fingerprint = tokenizer.fingerprint
    use_winograd(tokenizer.encoder)
    assert any(isinstance(module, WinogradConv2d) for module in tokenizer.encoder.modules())
    assert tokenizer.fingerprint == fingerprint
