"""Nearest-entry quantizers: the right entry, gradients in the right places, dead entries moved."""

import pytest
import torch
import torch.nn.functional as F
from quantizer_support import features, quantizer_of

from stages.first_stage.quantizers.entropy import entropy
from stages.options import TokenizerTrainOptions

FREE = ["vq", "vq-l2"]
NEAREST = [*FREE, "vq-ema", "simvq"]


@pytest.fixture(params=NEAREST)
def quantizer(request):
    return quantizer_of(request.param)


@pytest.fixture(params=FREE)
def free(request):
    return quantizer_of(request.param)


def test_chooses_the_nearest_entry(quantizer):
    z = features(quantizer)
    vectors = quantizer.compared(z.permute(0, 2, 3, 1).reshape(-1, 4)).double()
    expected = torch.cdist(vectors, quantizer.codebook().double()).argmin(-1).view(3, 5, 4)
    assert torch.equal(quantizer.encode(z), expected)
    assert torch.equal(quantizer(z).codes_BHW, expected)


def test_gradient_passes_straight_through(quantizer):
    z = features(quantizer).requires_grad_()
    vectors = F.normalize(z, dim=1) if quantizer.is_spherical else z
    weight = torch.randn(z.shape)
    (quantizer(z).z_BDHW * weight).sum().backward()
    (expected,) = torch.autograd.grad((vectors * weight).sum(), z)
    torch.testing.assert_close(z.grad, expected)


def test_each_loss_moves_its_own_side(free):
    z = features(free).requires_grad_()
    free(z).losses["codebook"].backward()
    assert z.grad is None and free.embedding.weight.grad.abs().sum() > 0
    free.zero_grad()
    free(z).losses["commitment"].backward()
    assert z.grad.abs().sum() > 0 and free.embedding.weight.grad is None


def test_an_entropy_term_joins_where_it_has_a_weight(quantizer):
    z = features(quantizer)
    assert "entropy" not in quantizer(z).losses
    quantizer.configure(TokenizerTrainOptions(entropy_weight=0.1))
    vectors = quantizer.compared(z.permute(0, 2, 3, 1).reshape(-1, 4))
    p_NK = (-torch.cdist(vectors, quantizer.codebook()).square() / 0.01).softmax(-1)
    expected = entropy(p_NK).mean() - entropy(p_NK.mean(0))
    torch.testing.assert_close(quantizer.eval()(z).losses["entropy"], expected, atol=1e-3, rtol=1e-3)


def test_the_decoder_moves_no_entry(quantizer):
    quantizer(features(quantizer).requires_grad_()).z_BDHW.sum().backward()
    assert all(p.grad is None for p in quantizer.parameters())


def test_the_gradient_option_reaches_the_quantizer(quantizer):
    z = features(quantizer)
    gradients = []
    for name in ("straight-through", "rotation"):
        quantizer.configure(TokenizerTrainOptions(quantizer_gradient=name))
        leaf = z.clone().requires_grad_()
        quantizer(leaf).z_BDHW.square().sum().backward()
        gradients.append(leaf.grad)
    assert not torch.allclose(*gradients)


def test_spherical_entries_are_of_unit_length_for_the_decoder():
    quantizer = quantizer_of("vq-l2")
    with torch.no_grad():
        quantizer.embedding.weight *= 3.0
    torch.testing.assert_close(quantizer.codebook().norm(dim=-1), torch.ones(16))
    torch.testing.assert_close(quantizer(features(quantizer)).z_BDHW.norm(dim=1), torch.ones(3, 5, 4))


def test_dead_entries_move_onto_encoder_outputs(free):
    counts = torch.ones(16, dtype=torch.int64)
    counts[[3, 7]] = 0
    before = free.embedding.weight.clone()
    vectors = torch.randn(10, 4)
    assert free.revive(counts, vectors).tolist() == [3, 7]
    assert torch.equal(free.embedding.weight[counts > 0], before[counts > 0])
    assert torch.equal(free.embedding.weight[counts == 0], vectors[[0, 9]])
    assert counts.sum() == 14, "the caller's counts stay"


def test_more_dead_entries_than_vectors_all_end_apart(free):
    vectors = free(features(free)).vectors_ND[:5]
    assert len(free.revive(torch.zeros(16, dtype=torch.int64), vectors)) == 16
    assert len(free.codebook().detach().unique(dim=0)) == 16


def test_one_linear_map_moves_all_entries():
    quantizer = quantizer_of("simvq")
    before = quantizer.codebook().detach().clone()
    quantizer(features(quantizer)).losses["codebook"].backward()
    assert quantizer.embedding.weight.grad is None
    with torch.no_grad():
        quantizer.map.weight -= 0.1 * quantizer.map.weight.grad
    assert (quantizer.codebook() != before).any(-1).all()
