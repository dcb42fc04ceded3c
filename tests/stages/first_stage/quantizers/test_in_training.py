"""Every quantizer inside the trainer: losses count, codebooks start and revive, training goes on exactly from its state."""

import dataclasses

import pytest
import torch
from quantizer_support import QUANTIZER_SHAPES
from tests_support import TINY_TOKENIZER

from stages.first_stage import training
from stages.first_stage.quantizers import QUANTIZERS
from stages.first_stage.quantizers.base import to_vectors
from stages.first_stage.tokenizer import Tokenizer
from stages.first_stage.training import FirstStageTrainer
from stages.options import TokenizerTrainOptions

OPTIONS = TokenizerTrainOptions(num_samples=80, global_batch_size=8, learning_rate=1e-3, precision="fp32")


def build(kind, **options):
    size, dim, levels = QUANTIZER_SHAPES[kind]
    shape = dict(codebook_size=size, codebook_dim=dim, fsq_levels=levels)
    torch.manual_seed(0)
    tokenizer = Tokenizer(dataclasses.replace(TINY_TOKENIZER, quantizer=kind, **shape))
    return FirstStageTrainer(tokenizer, None, dataclasses.replace(OPTIONS, **options))


def images(seed):
    return torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def take_step(trainer, step):
    """As a training on Ray takes it: what is drawn follows from the step."""
    torch.manual_seed(step)
    return trainer.step(images(step), step * 8)


@pytest.mark.parametrize("kind", QUANTIZERS)
def test_training_goes_on_bitwise(kind):
    straight, stopped, resumed = build(kind), build(kind), build(kind)
    for step in range(2):
        for trainer in (straight, stopped):
            take_step(trainer, step)
            trainer.revive_dead_codes()
    resumed.load_state_dict(stopped.state_dict())
    for step in range(2, 4):
        assert straight.revive_dead_codes() == resumed.revive_dead_codes()
        a, b = (take_step(trainer, step) for trainer in (straight, resumed))
        assert {name: value.item() for name, value in a.items()} == {name: value.item() for name, value in b.items()}
    a, b = straight.averaged_tokenizer().baked().state_dict(), resumed.averaged_tokenizer().baked().state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("kind", [kind for kind in QUANTIZERS if kind != "fsq"])
def test_every_loss_is_logged_and_counts(kind):
    one = build(kind, **{f"{name}_weight": 0.0 for name in ("codebook", "commitment", "entropy", "kl")})
    other = build(kind, **{f"{name}_weight": 9.0 for name in ("codebook", "commitment", "entropy", "kl")})
    names = one.tokenizer.quantize(torch.randn(1, one.tokenizer.config.codebook_dim, 2, 2)).losses.keys()
    for trainer in (one, other):
        assert names <= trainer.step(images(0), 0).keys()
    assert not torch.equal(one.tokenizer.quant_conv.weight, other.tokenizer.quant_conv.weight)


@pytest.mark.parametrize("kind", ["vq", "vq-l2", "vq-ema"])
@pytest.mark.parametrize("kmeans_start", [True, False])
def test_the_codebook_starts_on_the_first_batch_if_asked(kind, kmeans_start):
    trainer = build(kind, kmeans_start=kmeans_start, learning_rate=1e-9, codebook_decay=0.9999)
    before = trainer.tokenizer.quantize.codebook().detach().clone()
    trainer.step(images(0), 0)
    moved = (trainer.tokenizer.quantize.codebook() - before).abs().amax(-1)
    assert (moved > 1e-2).all() if kmeans_start else (moved < 1e-2).all()
    averaged = trainer.averaged_tokenizer().quantize.codebook()
    torch.testing.assert_close(averaged, trainer.tokenizer.quantize.codebook(), atol=5e-3, rtol=0)


def test_dead_entries_move_onto_the_vectors_of_several_steps(monkeypatch):
    monkeypatch.setattr(training, "NUM_RECENT_VECTORS", 1000)
    trainer = build("vq", learning_rate=1e-9)
    for step in range(3):
        trainer.step(images(step), 8 + step)
    assert len(trainer.recent_vectors_ND) == 1000, "of 3 x 8 images with 64 codes"
    z = trainer.tokenizer.quant_conv(trainer.tokenizer.encoder(images(2)))
    torch.testing.assert_close(trainer.recent_vectors_ND[-512:], to_vectors(z), atol=1e-4, rtol=1e-4)
    trainer.code_counts_K.zero_()
    trainer.revive_dead_codes()
    entries = trainer.tokenizer.quantize.codebook()
    assert torch.equal(entries[0], trainer.recent_vectors_ND[0]) and torch.equal(
        entries[-1], trainer.recent_vectors_ND[-1]
    )


def test_the_health_of_a_gumbel_codebook_is_that_of_its_codes_and_not_of_what_is_drawn():
    trainer = build("gumbel", learning_rate=1e-9)
    trainer.tokenizer.quantize.proj.weight.data.zero_()
    trainer.tokenizer.quantize.proj.bias.data.zero_()[5] = 1.0  # the likeliest of nearly equal ones
    trainer.step(images(0), 0)
    counts = trainer.health_counts_K
    assert counts[5] == counts.sum() > 0 and torch.equal(counts, trainer.code_counts_K)


@pytest.mark.parametrize("kind", ["vq", "vq-l2", "vq-ema"])
def test_revived_entries_leave_their_past_behind(kind):
    trainer = build(kind)
    trainer.step(images(0), 0)
    trainer.code_counts_K.fill_(1)
    trainer.code_counts_K[3] = 0
    vectors = trainer.recent_vectors_ND
    assert trainer.revive_dead_codes() == 1 and trainer.code_counts_K.sum() == 0
    for tokenizer in (trainer.tokenizer, trainer.averaged_tokenizer()):
        torch.testing.assert_close(tokenizer.quantize.codebook()[3], vectors[0])
