"""What every quantizer must do, whatever its kind."""

import pytest
import torch
from quantizer_support import QUANTIZER_SHAPES, features, quantizer_of

from stages.first_stage.quantizers import QUANTIZERS, build_quantizer
from stages.first_stage.quantizers.loss_weights import LOSS_NAMES
from stages.first_stage.quantizers.nearest import nearest


@pytest.fixture(params=sorted(QUANTIZERS))
def quantizer(request):
    return quantizer_of(request.param)


def test_codes_have_the_promised_shape_and_range(quantizer):
    z = features(quantizer)
    codes = quantizer.encode(z)
    assert codes.shape == (3, 5, 4) and codes.dtype == torch.int64
    assert codes.min() >= 0 and codes.max() < quantizer.codebook_size
    assert len(codes.unique()) > 1


def test_code_vectors_lead_back_to_their_codes(quantizer):
    codes = torch.arange(quantizer.codebook_size).view(2, 2, -1)
    vectors = quantizer.decode(codes)
    assert vectors.shape == (2, quantizer.codebook_dim, 2, quantizer.codebook_size // 4)
    assert vectors.dtype == torch.float32
    flat = vectors.permute(0, 2, 3, 1).reshape(-1, quantizer.codebook_dim)
    assert torch.equal(flat, quantizer.codebook())
    assert torch.equal(nearest(flat.detach(), quantizer.codebook().detach()), codes.flatten())


@pytest.mark.parametrize("is_training", [False, True])
def test_the_decoder_sees_the_vectors_of_the_codes(quantizer, is_training):
    quantizer.train(is_training)
    codebook = quantizer.codebook().clone()
    z = features(quantizer)
    quantized = quantizer(z)
    expected = torch.nn.functional.embedding(quantized.codes_BHW, codebook).permute(0, 3, 1, 2)
    torch.testing.assert_close(quantized.z_BDHW, expected, atol=1e-5, rtol=1e-5)


def test_gradients_reach_the_encoder_and_every_loss_has_one(quantizer):
    quantizer.train()
    z = features(quantizer).requires_grad_()
    quantized = quantizer(z)
    weight = torch.randn(quantized.z_BDHW.shape, generator=torch.Generator().manual_seed(2))
    (gradient,) = torch.autograd.grad((quantized.z_BDHW * weight).sum(), z, retain_graph=True)
    assert gradient.isfinite().all() and (gradient.abs().sum((1, 2, 3)) > 0).all()
    learned = [z, *(p for p in quantizer.parameters() if p.requires_grad)]
    for name, loss in quantized.losses.items():
        assert name in LOSS_NAMES and loss.dim() == 0 and loss.isfinite()
        gradients = torch.autograd.grad(loss, learned, retain_graph=True, allow_unused=True)
        assert any(g is not None and g.abs().sum() > 0 for g in gradients), name


def test_every_learned_parameter_gets_a_gradient(quantizer):
    """Data-parallel training waits for each of them."""
    quantizer.train()
    quantized = quantizer(features(quantizer))
    total = quantized.z_BDHW.square().sum() + sum(quantized.losses.values())
    if total.requires_grad:
        total.backward()
    assert all(p.grad is not None for p in quantizer.parameters() if p.requires_grad)


def test_encoding_is_deterministic_and_what_evaluation_gives(quantizer):
    z = features(quantizer)
    codes = quantizer.train().encode(z)
    assert torch.equal(codes, quantizer.eval().encode(z))
    assert torch.equal(codes, quantizer(z).codes_BHW)


def test_training_twice_from_the_same_state_and_seed_is_the_same(quantizer):
    twin = quantizer_of(next(kind for kind in QUANTIZERS if type(quantizer_of(kind)) is type(quantizer)))
    z = features(quantizer)
    results = []
    for one in (quantizer, twin):
        torch.manual_seed(3)
        one.train().advance(64)
        results.append(one(z))
    a, b = results
    assert torch.equal(a.z_BDHW, b.z_BDHW) and torch.equal(a.codes_BHW, b.codes_BHW)


def test_codes_do_not_depend_on_the_rest_of_the_batch(quantizer):
    z = features(quantizer)
    assert torch.equal(torch.cat([quantizer.encode(one[None]) for one in z]), quantizer.encode(z))


def test_autocast_changes_nothing(quantizer):
    z = features(quantizer)
    plain = quantizer.eval()(z)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(quantizer.encode(z), plain.codes_BHW)
        cast = quantizer(z)
    assert torch.equal(cast.z_BDHW, plain.z_BDHW) and cast.z_BDHW.dtype == torch.float32
    assert all(torch.equal(cast.losses[name], plain.losses[name]) for name in plain.losses)
    half = quantizer.encode(z.bfloat16())
    assert torch.equal(half, quantizer.encode(z.bfloat16().float()))


def test_what_is_stored_gives_the_same_codes_and_vectors(quantizer):
    kind, tensors = quantizer.stored()
    levels = getattr(quantizer, "levels", ())
    copy = build_quantizer(kind, quantizer.codebook_size, quantizer.codebook_dim, levels)
    copy.load_state_dict(tensors)
    z = features(quantizer)
    codes = quantizer.encode(z)
    assert torch.equal(copy.encode(z), codes)
    torch.testing.assert_close(copy.decode(codes), quantizer.decode(codes))
    assert copy.stored()[0] == kind


def test_revival_moves_only_dead_rows_and_says_which(quantizer):
    vectors = quantizer(features(quantizer)).vectors_ND
    counts = torch.ones(quantizer.codebook_size, dtype=torch.int64)
    counts[[1, 6]] = 0
    before = quantizer.codebook().clone()
    rows = quantizer.revive(counts, vectors)
    moved = (quantizer.codebook() != before).any(-1).nonzero().flatten()
    assert rows.tolist() == moved.tolist() == ([1, 6] if quantizer.row_tensors else [])


def test_starting_keeps_the_codebook_in_use(quantizer):
    z = features(quantizer)
    quantizer.start(quantizer(z).vectors_ND)
    assert quantizer.codebook().isfinite().all()
    if quantizer.row_tensors:
        assert len(quantizer.encode(z).unique()) == quantizer.codebook_size


def test_another_shape_is_refused():
    with pytest.raises(ValueError, match="quantizer is cubic"):
        build_quantizer("cubic", 8, 3)
    with pytest.raises(ValueError, match="lfq has 16 codes of 4 dimensions"):
        build_quantizer("lfq", 8, 4)
    with pytest.raises(ValueError, match="fsq has 15 codes"):
        build_quantizer("fsq", 16, 2, (3, 5))
    assert set(QUANTIZER_SHAPES) == set(QUANTIZERS)
