"""Vector quantization: nearest entry, gradients in the right places, codebook health."""

import pytest
import torch
import torch.nn.functional as F

from stages.first_stage.quantizer import VectorQuantizer, usage


@pytest.fixture(params=[False, True], ids=["vq", "vq-l2"])
def quantizer(request):
    torch.manual_seed(1)
    return VectorQuantizer(16, 4, request.param)


def test_chooses_the_nearest_entry(quantizer):
    z = torch.randn(2, 4, 3, 3)
    vectors = z.permute(0, 2, 3, 1).reshape(-1, 4)
    if quantizer.l2_normalize:
        vectors = F.normalize(vectors, dim=-1)
    expected = torch.cdist(vectors.double(), quantizer.codebook().double()).argmin(-1).view(2, 3, 3)
    assert torch.equal(quantizer.encode(z), expected)
    assert torch.equal(quantizer(z).codes_BHW, expected)


def test_gradient_passes_straight_through(quantizer):
    z = torch.randn(1, 4, 2, 2, requires_grad=True)
    vectors = F.normalize(z, dim=1) if quantizer.l2_normalize else z
    weight = torch.randn(1, 4, 2, 2)
    (quantizer(z).z_BDHW * weight).sum().backward()
    (expected,) = torch.autograd.grad((vectors * weight).sum(), z)
    torch.testing.assert_close(z.grad, expected)


def test_each_loss_moves_its_own_side(quantizer):
    z = torch.randn(1, 4, 2, 2, requires_grad=True)
    quantizer(z).codebook_loss.backward()
    assert z.grad is None and quantizer.embedding.weight.grad.abs().sum() > 0
    quantizer.zero_grad()
    quantizer(z).commitment_loss.backward()
    assert z.grad.abs().sum() > 0 and quantizer.embedding.weight.grad is None


def test_decoding_gives_the_entries(quantizer):
    codes = torch.arange(16).view(1, 4, 4)
    torch.testing.assert_close(quantizer.decode(codes)[0].permute(1, 2, 0).reshape(16, 4), quantizer.codebook())


def test_distances_stay_float32_under_autocast(quantizer):
    z = torch.randn(1, 4, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(quantizer.encode(z), quantizer.encode(z.clone()))
        assert quantizer(z).codebook_loss.dtype == torch.float32
    assert torch.equal(quantizer.encode(z), VectorQuantizer.encode(quantizer, z))


def test_dead_entries_move_onto_encoder_outputs(quantizer):
    is_dead = torch.zeros(16, dtype=torch.bool)
    is_dead[[3, 7]] = True
    before = quantizer.embedding.weight.clone()
    vectors = torch.randn(10, 4)
    assert quantizer.revive(is_dead, vectors) == 2
    assert torch.equal(quantizer.embedding.weight[~is_dead], before[~is_dead])
    assert torch.equal(quantizer.embedding.weight[is_dead], vectors[[0, 9]])


def test_usage_and_perplexity():
    assert usage(torch.tensor([5, 5, 0, 0])) == (0.5, pytest.approx(2.0))
    assert usage(torch.ones(8, dtype=torch.int64)) == (1.0, pytest.approx(8.0))
    assert usage(torch.zeros(8, dtype=torch.int64)) == (0.0, 1.0)
