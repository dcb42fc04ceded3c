"""Gumbel-softmax: noise in training that follows from the seed, none when encoding, a temperature that falls."""

import math

import pytest
import torch
from quantizer_support import features, quantizer_of

from stages.options import TokenizerTrainOptions

OPTIONS = TokenizerTrainOptions(num_samples=1000, gumbel_start_temperature=2.0, gumbel_end_temperature=0.5)


@pytest.fixture
def quantizer():
    return quantizer_of("gumbel")


def test_encoding_takes_the_likeliest_entry(quantizer):
    z = features(quantizer)
    assert torch.equal(quantizer.encode(z), quantizer.proj(z).argmax(1))


def test_training_draws_and_the_seed_decides_what(quantizer):
    quantizer.train().configure(OPTIONS)
    z = features(quantizer)
    drawn = {}
    for seed in (0, 1, 1, 0):
        torch.manual_seed(seed)
        quantizer.advance(8)
        codes = quantizer(z).codes_BHW
        assert torch.equal(codes, drawn.setdefault(seed, codes))
    assert not torch.equal(drawn[0], drawn[1])


def test_codes_are_drawn_with_the_probabilities_of_the_logits(quantizer):
    quantizer.train()
    z = features(quantizer)[:1, :, :1, :1].expand(1, 4, 100, 200)
    frequencies = torch.bincount(quantizer(z).codes_BHW.flatten(), minlength=16) / 20_000
    expected = quantizer.proj(z)[0, :, 0, 0].softmax(0)
    torch.testing.assert_close(frequencies, expected, atol=0.015, rtol=0)


def test_the_temperature_falls_along_a_cosine(quantizer):
    quantizer.configure(OPTIONS)
    found = []
    for num_seen in (0, 500, 1000, 5000):
        quantizer.advance(num_seen)
        found.append(quantizer.temperature)
    assert found == pytest.approx([2.0, 1.25, 0.5, 0.5])


def test_the_divergence_is_zero_for_uniform_choice_and_ln_k_for_a_sure_one(quantizer):
    z = features(quantizer)
    with torch.no_grad():
        quantizer.proj.weight.zero_()
        quantizer.proj.bias.zero_()
        assert quantizer(z).losses["kl"].item() == pytest.approx(0.0, abs=1e-6)
        quantizer.proj.bias[3] = 100.0
        assert quantizer(z).losses["kl"].item() == pytest.approx(math.log(16), abs=1e-5)


def test_the_gradient_reaches_the_logits_and_all_entries_near_them(quantizer):
    quantizer.train()(features(quantizer)).z_BDHW.square().sum().backward()
    assert (quantizer.proj.weight.grad.flatten(1).abs().sum(1) > 0).all()
    assert quantizer.embed.weight.grad.abs().sum() > 0
