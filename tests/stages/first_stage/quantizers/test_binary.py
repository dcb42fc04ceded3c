"""Binary codes: bits are signs, and the entropy term against brute force over all entries."""

import pytest
import torch
import torch.nn.functional as F

from stages.first_stage.quantizers.binary import BinaryQuantizer, SphericalBinaryQuantizer
from stages.first_stage.quantizers.entropy import binary_entropy_loss, entropy

KINDS = [BinaryQuantizer, SphericalBinaryQuantizer]


@pytest.mark.parametrize("kind", KINDS)
def test_bits_are_signs_and_the_entry_is_the_nearest_one(kind):
    torch.manual_seed(0)
    quantizer = kind(5)
    vectors = torch.randn(200, 5)
    codes = quantizer.assign(vectors)
    assert torch.equal((codes[:, None] >> torch.arange(5)) & 1, (vectors > 0).long())
    entries = quantizer.codebook()
    assert torch.equal(torch.cdist(quantizer.compared(vectors), entries).argmin(-1), codes)
    length = 1.0 if kind is SphericalBinaryQuantizer else 5**0.5
    torch.testing.assert_close(entries.norm(dim=-1), torch.full((32,), length))


@pytest.mark.parametrize("kind", KINDS)
def test_the_entropy_is_that_of_a_softmax_over_all_distances(kind):
    torch.manual_seed(0)
    quantizer = kind(6)
    z = torch.randn(2, 6, 4, 4)
    vectors = quantizer.compared(z.permute(0, 2, 3, 1).reshape(-1, 6))
    p_NK = (-torch.cdist(vectors, quantizer.codebook()).square()).softmax(-1)
    expected = entropy(p_NK).mean() - entropy(p_NK.mean(0))
    torch.testing.assert_close(quantizer(z).losses["entropy"], expected, atol=1e-4, rtol=1e-4)


def test_groups_of_bits_count_as_independent():
    torch.manual_seed(0)
    logits = torch.randn(64, 10)
    parts = [binary_entropy_loss(part) for part in (logits[:, :8], logits[:, 8:])]
    torch.testing.assert_close(binary_entropy_loss(logits), sum(parts))


def test_the_entropy_prefers_sure_and_varied_codes():
    sure_and_varied = 20.0 * torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    assert binary_entropy_loss(sure_and_varied) < binary_entropy_loss(sure_and_varied[:1].expand(4, 2))
    assert binary_entropy_loss(sure_and_varied) < binary_entropy_loss(0.01 * sure_and_varied)
    assert binary_entropy_loss(1e4 * sure_and_varied).isfinite()


def test_only_free_codes_have_a_commitment():
    z = torch.randn(1, 4, 2, 2)
    assert set(SphericalBinaryQuantizer(4)(z).losses) == {"entropy"}
    free = BinaryQuantizer(4)(z).losses
    assert set(free) == {"commitment", "entropy"}
    torch.testing.assert_close(free["commitment"], F.mse_loss(z, z.sign()))
