"""Searches over the codebook: exact, bounded in memory, and the entries a codebook starts from."""

import pytest
import torch
import torch.nn.functional as F

from stages.first_stage.quantizers import nearest as module
from stages.first_stage.quantizers.nearest import kmeans, largest_product, nearest, spread, totals


@pytest.mark.parametrize("dim", [3, 8, 256])
@pytest.mark.parametrize("search", [nearest, largest_product])
def test_pieces_give_the_codes_of_the_whole(monkeypatch, dim, search):
    torch.manual_seed(0)
    vectors, codebook = torch.randn(300, dim), torch.randn(1000, dim)
    whole = search(vectors, codebook)
    expected = torch.cdist(vectors.double(), codebook.double()).argmin(-1)
    if search is largest_product:
        expected = (vectors.double() @ codebook.double().t()).argmax(-1)
    assert torch.equal(whole, expected)
    monkeypatch.setattr(module, "ENTRIES_AT_ONCE", 64)
    monkeypatch.setattr(module, "DISTANCES_AT_ONCE", 64 * 50)
    assert torch.equal(search(vectors, codebook), whole)


def test_of_equal_entries_the_first_is_chosen(monkeypatch):
    codebook = torch.randn(4, 3).repeat(5, 1)
    vectors = torch.randn(20, 3)
    assert nearest(vectors, codebook).max() < 4
    monkeypatch.setattr(module, "ENTRIES_AT_ONCE", 6)
    assert nearest(vectors, codebook).max() < 4


def test_memory_does_not_grow_with_the_codebook(monkeypatch):
    shapes, real = [], torch.addmm
    monkeypatch.setattr(torch, "addmm", lambda *args, **kwargs: shapes.append(real(*args, **kwargs)) or shapes[-1])
    monkeypatch.setattr(module, "DISTANCES_AT_ONCE", 1 << 18)
    nearest(torch.randn(40, 2), torch.randn(1 << 18, 2))
    assert max(distances.numel() for distances in shapes) <= 1 << 18


def test_codebooks_of_published_sizes_are_searched_in_one_piece(monkeypatch):
    """The codes of existing tokenizers must not depend on pieces."""
    shapes, real = [], torch.addmm
    monkeypatch.setattr(torch, "addmm", lambda *args, **kwargs: shapes.append(real(*args, **kwargs)) or shapes[-1])
    nearest(torch.randn(512, 8), torch.randn(16_384, 8))
    assert [tuple(distances.shape) for distances in shapes] == [(512, 16_384)]


@pytest.mark.parametrize("is_spherical", [False, True])
def test_kmeans_finds_clusters(is_spherical):
    torch.manual_seed(0)
    centres = F.normalize(torch.randn(6, 8), dim=-1)
    vectors = (centres[:, None] + 0.02 * torch.randn(6, 50, 8)).reshape(-1, 8)
    vectors = F.normalize(vectors, dim=-1) if is_spherical else vectors
    found = kmeans(vectors, 6, 10, is_spherical)
    assert torch.cdist(centres, found).min(-1).values.max() < 0.05
    if is_spherical:
        torch.testing.assert_close(found.norm(dim=-1), torch.ones(6))
    assert torch.equal(found, kmeans(vectors, 6, 10, is_spherical))


def test_lloyd_only_lowers_the_error():
    torch.manual_seed(0)
    vectors = torch.randn(500, 4)
    errors = [torch.cdist(vectors, kmeans(vectors, 20, n, False)).min(-1).values.square().sum() for n in range(5)]
    assert all(later < earlier for earlier, later in zip(errors, errors[1:]))


def test_totals_by_code():
    vectors, codes = torch.randn(50, 3), torch.randint(6, (50,)) * 2  # odd codes do not occur
    counts, sums = totals(vectors, codes, 13)
    for k in range(13):
        assert counts[k] == (codes == k).sum()
        torch.testing.assert_close(sums[k], vectors[codes == k].sum(0))


def test_fewer_vectors_than_entries_are_all_kept_and_the_rest_lie_beside_them():
    vectors = 10.0 * torch.eye(5)
    entries = spread(vectors, 12)
    assert torch.equal(entries[:5], vectors)
    assert len(entries.unique(dim=0)) == 12
    assert torch.equal(nearest(entries, vectors)[5:], torch.tensor([0, 1, 2, 3, 4, 0, 1]))
