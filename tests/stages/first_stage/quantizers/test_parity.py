"""VQ and Gumbel against the original's `VectorQuantizer2` and `GumbelQuantize`: the same values and gradients."""

import pytest
import torch
from oracles import taming

from stages.first_stage.quantizers.gumbel import GumbelQuantizer
from stages.first_stage.quantizers.loss_weights import loss_weights
from stages.first_stage.quantizers.vq import VectorQuantizer
from stages.options import TokenizerTrainOptions

SIZE, DIM = 32, 6


@pytest.fixture
def original():
    return taming("modules.vqvae.quantize")


@pytest.fixture
def z():
    return torch.randn(2, DIM, 5, 3, generator=torch.Generator().manual_seed(4))


def compare(ours, theirs, z, total_of_ours, total_of_theirs):
    """Both totals with their gradients for the input and every parameter."""
    for module in (ours, theirs):
        module.zero_grad()
    leaves = [z.clone().requires_grad_() for _ in range(2)]
    totals = [total_of_ours(leaves[0]), total_of_theirs(leaves[1])]
    for total in totals:
        total.backward()
    torch.testing.assert_close(totals[0], totals[1], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad, atol=1e-6, rtol=1e-5)
    for (name, one), (other_name, other) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert name == other_name
        torch.testing.assert_close(one.grad, other.grad, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("is_legacy", [True, False])
def test_codes_losses_and_gradients_of_vq(original, z, is_legacy):
    options = TokenizerTrainOptions(loss_preset="compvis-legacy") if is_legacy else TokenizerTrainOptions()
    weights = loss_weights("vq", options)
    theirs = original.VectorQuantizer2(SIZE, DIM, beta=0.25, legacy=is_legacy, sane_index_shape=True)
    torch.nn.init.normal_(theirs.embedding.weight)
    ours = VectorQuantizer(SIZE, DIM)
    ours.load_state_dict(theirs.state_dict())
    assert torch.equal(ours.encode(z), theirs(z)[2][2])
    weight = torch.randn(z.shape)

    def total_of_ours(leaf):
        quantized = ours(leaf)
        losses = sum(weights[name] * value for name, value in quantized.losses.items())
        return losses + (quantized.z_BDHW * weight).sum()

    def total_of_theirs(leaf):
        entries, loss, _ = theirs(leaf)
        return loss + (entries * weight).sum()

    compare(ours, theirs, z, total_of_ours, total_of_theirs)
    codes = ours.encode(z)
    torch.testing.assert_close(ours.decode(codes), theirs.get_codebook_entry(codes.flatten(), (2, 5, 3, DIM)))


@pytest.mark.parametrize("is_training", [True, False])
def test_draws_losses_and_gradients_of_gumbel(original, z, is_training):
    kl_weight = loss_weights("vq", TokenizerTrainOptions(loss_preset="compvis-legacy"))["kl"] * 1e6  # large enough to be seen
    theirs = original.GumbelQuantize(DIM, DIM, SIZE, kl_weight=kl_weight, temp_init=0.7).train(is_training)
    ours = GumbelQuantizer(SIZE, DIM, temperature=0.7).train(is_training)
    ours.load_state_dict(theirs.state_dict())
    weight = torch.randn(z.shape)

    def total_of_ours(leaf):
        torch.manual_seed(8)
        quantized = ours(leaf)
        return kl_weight * quantized.losses["kl"] + (quantized.z_BDHW * weight).sum()

    def total_of_theirs(leaf):
        torch.manual_seed(8)
        entries, loss, _ = theirs(leaf)
        return loss + (entries * weight).sum()

    if is_training:
        compare(ours, theirs, z, total_of_ours, total_of_theirs)
        torch.manual_seed(8)
        codes = ours(z).codes_BHW
        torch.manual_seed(8)
        assert torch.equal(codes, theirs(z)[2][2])
    else:
        # In evaluation the original still draws; without its noise it takes what ours does.
        torch.testing.assert_close(ours(z).losses["kl"] * kl_weight, theirs(z)[1])
        assert torch.equal(ours.encode(z), theirs.proj(z).argmax(1))
    codes = ours.encode(z)
    torch.testing.assert_close(ours.decode(codes), theirs.get_codebook_entry(codes.flatten(), (2, 5, 3, DIM)))
