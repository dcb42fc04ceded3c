"""Index backpropagation: gradients in pieces equal those of the whole, and reach every entry."""

import pytest
import torch
import torch.nn.functional as F
from quantizer_support import features, quantizer_of

from stages.first_stage.quantizers import entropy as module
from stages.first_stage.quantizers.entropy import entropy


def plain(quantizer, z):
    """The published computation in one piece."""
    logits_BKHW = torch.einsum("bdhw,kd->bkhw", z, quantizer.embedding.weight)
    soft = logits_BKHW.softmax(1)
    hard = torch.zeros_like(soft).scatter_(1, soft.argmax(1, keepdim=True), 1.0)
    chosen = torch.einsum("bkhw,kd->bdhw", hard - soft.detach() + soft, quantizer.embedding.weight)
    entries = torch.einsum("bkhw,kd->bdhw", hard, quantizer.embedding.weight)
    p_NK = (logits_BKHW / 0.01).softmax(1).permute(0, 2, 3, 1).reshape(-1, quantizer.codebook_size)
    return chosen, {
        "index": F.mse_loss(chosen, z),
        "codebook": F.mse_loss(entries, z.detach()),
        "commitment": F.mse_loss(z, entries.detach()),
        "entropy": entropy(p_NK).mean() - entropy(p_NK.mean(0)),
    }


@pytest.mark.parametrize("at_once", [1 << 26, 16 * 7])
def test_values_and_gradients_are_the_published_ones(monkeypatch, at_once):
    monkeypatch.setattr(module, "PROBABILITIES_AT_ONCE", at_once)
    quantizer = quantizer_of("ibq")
    z = features(quantizer).requires_grad_()
    weight = torch.randn(z.shape)
    quantized = quantizer(z)
    chosen, losses = plain(quantizer, z)
    torch.testing.assert_close(quantized.z_BDHW, chosen)
    inputs = [z, quantizer.embedding.weight]
    found = [(quantized.z_BDHW * weight).sum(), *quantized.losses.values()]
    expected = [(chosen * weight).sum(), *(losses[name] for name in quantized.losses)]
    for ours, theirs in zip(found, expected):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
        ours_gradients = torch.autograd.grad(ours, inputs, retain_graph=True, allow_unused=True)
        theirs_gradients = torch.autograd.grad(theirs, inputs, retain_graph=True, allow_unused=True)
        for one, other in zip(ours_gradients, theirs_gradients):
            assert (one is None) == (other is None)
            if one is not None:
                torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)


def test_the_decoder_moves_every_entry():
    quantizer = quantizer_of("ibq")
    quantizer(features(quantizer)).z_BDHW.square().sum().backward()
    assert (quantizer.embedding.weight.grad.abs().sum(-1) > 0).all()
