"""The first-stage trainer on tiny images: it learns, the two players stay apart, and it goes on exactly from its state."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from oracles import taming
from tests_support import TINY_TOKENIZER

from stages.first_stage.discriminator import build_discriminator
from stages.first_stage.pixels import to_one_hot
from stages.first_stage.tokenizer import Tokenizer
from stages.first_stage.training import FirstStageTrainer
from stages.first_stage.weight_average import WeightAverage
from stages.options import TokenizerTrainOptions

OPTIONS = TokenizerTrainOptions(
    num_samples=1000,
    global_batch_size=8,
    learning_rate=2e-3,
    decay="none",
    discriminator_weight=0.5,
    discriminator_channels=8,
    discriminator_layers=1,
    precision="fp32",
)


def build(options=OPTIONS, **changes):
    torch.manual_seed(0)
    options = dataclasses.replace(options, **changes)
    return FirstStageTrainer(Tokenizer(TINY_TOKENIZER), build_discriminator(options, 3, 16), options)


def images(seed):
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(8, 3, 1, 1, generator=generator) * 2 - 1).expand(8, 3, 16, 16).contiguous()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_reconstruction_improves(precision):
    trainer = build(precision=precision, discriminator_weight=0.0, learning_rate=1e-3)
    losses = [trainer.step(images(step), step * 8)["reconstruction"].item() for step in range(60)]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])


def test_discriminator_learns_before_its_term_is_switched_on():
    trainer = build(discriminator_start_samples=10**6)
    before = trainer.discriminator.main[0].weight.clone()
    metrics = trainer.step(images(0), 0)
    assert "generator" not in metrics and metrics["discriminator"] > 0
    assert not torch.equal(before, trainer.discriminator.main[0].weight)


def test_a_step_runs_the_tokenizer_once():
    """The original runs it once per optimizer, and shows the discriminator reconstructions of weights that moved on."""
    trainer, outputs, shown = build(kmeans_start=False), [], []
    trainer.tokenizer.register_forward_hook(lambda module, inputs, output: outputs.append(output[0].detach()))
    loss = trainer.adversary.loss
    trainer.adversary.loss = lambda images, reconstructions, step: shown.append(reconstructions) or loss(
        images, reconstructions, step
    )
    trainer.step(images(0), 0)
    assert len(outputs) == len(shown) == 1 and torch.equal(outputs[0], shown[0])


def test_generator_pass_leaves_no_gradient_on_the_discriminator():
    trainer = build()
    trainer._discriminator_step = lambda *args: {}
    trainer.step(images(0), 0)
    assert all(p.grad is None and p.requires_grad for p in trainer.discriminator.parameters())


@pytest.mark.parametrize("first, is_on", [(True, False), (False, True)])
def test_the_term_starts_with_the_first_image_after_its_start(first, is_on):
    """Schedules count images, not calls: two optimizers, or a resume, cannot shift them."""
    trainer = build(discriminator_start_samples=80)
    metrics = trainer.step(images(0), 79 if first else 80)
    assert ("generator" in metrics) == is_on


def test_the_discriminator_can_be_left_out_until_shortly_before():
    trainer = build(discriminator_start_samples=80, discriminator_warm_samples=16)
    assert "discriminator" not in trainer.step(images(0), 56)
    metrics = trainer.step(images(0), 64)
    assert "discriminator" in metrics and "generator" not in metrics


def test_the_term_rises_over_its_ramp():
    weights = []
    for num_seen in (16, 24, 32, 40):
        trainer = build(discriminator_ramp_samples=16, discriminator_start_samples=16, adaptive_weight=False)
        weights.append(trainer.step(images(0), num_seen).get("adversarial_weight", torch.zeros(())).item())
    assert weights == [0.0, 0.25, 0.5, 0.5]


def test_a_discriminator_never_moves_the_tokenizer_before_its_start():
    """The warm discriminator sees reconstructions, but what it says does not reach the tokenizer."""
    with_one, without = build(discriminator_start_samples=10**6), build(discriminator_weight=0.0)
    for step in range(2):
        with_one.step(images(step), step * 8)
        without.step(images(step), step * 8)
    for a, b in zip(with_one.tokenizer.parameters(), without.tokenizer.parameters()):
        assert torch.equal(a, b)


def test_the_discriminators_step_leaves_no_gradient_on_the_tokenizer():
    trainer = build()
    reconstructions = trainer.tokenizer(images(0))[0]
    loss, _ = trainer.adversary.loss(images(0), reconstructions, 0)
    loss.backward()
    assert all(parameter.grad is None for parameter in trainer.tokenizer.parameters())


def test_adaptive_weight_is_that_of_the_original():
    trainer = build(max_adaptive_weight=1e4, kmeans_start=False)
    reconstructions, _ = trainer.tokenizer(images(0))
    reconstruction = (reconstructions - images(0)).abs().mean()
    generator = -trainer.discriminator(reconstructions).mean()
    original = taming("modules.losses.vqperceptual").VQLPIPSWithDiscriminator.calculate_adaptive_weight
    last_layer = trainer.tokenizer.decoder.conv_out.weight
    expected = original(SimpleNamespace(discriminator_weight=0.5), reconstruction, generator, last_layer)
    found = trainer.step(images(0), 0)["adversarial_weight"]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0.0)


def test_adaptive_weight_under_autocast_is_that_of_fp32():
    exact, rounded = (build(precision=precision, kmeans_start=False) for precision in ("fp32", "bf16"))
    a, b = (trainer.step(images(0), 0)["adversarial_weight"] for trainer in (exact, rounded))
    assert b.dtype == torch.float32
    torch.testing.assert_close(b, a, rtol=0.1, atol=0.0)


def test_adaptive_weight_is_the_same_on_every_rank():
    """Norms are averaged over the ranks before the ratio is taken."""
    trainer, seen = build(kmeans_start=False), []

    def average_with_a_rank_of_double_norm(tensor):
        seen.append(tensor.clone())
        tensor[0] *= 1.5

    plain = build(kmeans_start=False).step(images(0), 0)["adversarial_weight"]
    trainer.all_reduce_mean = average_with_a_rank_of_double_norm
    assert trainer.step(images(0), 0)["adversarial_weight"].item() == pytest.approx(1.5 * plain.item(), rel=1e-5)
    assert len(seen) == 1 and seen[0].shape == (2,)


def test_the_cap_holds():
    trainer = build(max_adaptive_weight=1e-3)
    assert trainer.step(images(0), 0)["adversarial_weight"].item() == pytest.approx(0.5 * 1e-3)


@pytest.mark.parametrize("name", ["hinge", "vanilla", "non-saturating"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_loss_with_every_regulariser_makes_finite_steps(name, precision):
    trainer = build(discriminator_loss=name, lecam_weight=0.1, r1_weight=1.0, r1_every_steps=2, precision=precision)
    first, second = trainer.step(images(0), 0), trainer.step(images(1), 8)
    assert all(torch.isfinite(value) for value in [*first.values(), *second.values()])
    assert "r1" in first and "r1" not in second and "lecam" in second
    assert trainer.adversary.logit_means.abs().sum() > 0


def test_gradients_are_clipped():
    """A clipped gradient of Adam moves as much as another; so the optimizer is asked what it got."""
    trainer = build(grad_clip=1e-3, discriminator_weight=0.0)
    step, norms = trainer.tokenizer_optimizer.step, []

    def watched():
        norms.append(torch.nn.utils.get_total_norm([p.grad for p in trainer.tokenizer.parameters()]).item())
        step()

    trainer.tokenizer_optimizer.step = watched
    metrics = trainer.step(images(0), 0)
    assert metrics["grad_norm"] > 1e-3 and norms == [pytest.approx(1e-3, rel=1e-3)]


def test_labels_are_learned_by_cross_entropy():
    config = dataclasses.replace(TINY_TOKENIZER, in_channels=5)
    options = dataclasses.replace(OPTIONS, discriminator_weight=0.0)
    torch.manual_seed(0)
    trainer = FirstStageTrainer(Tokenizer(config), None, options, is_labels=True)
    labels = torch.arange(8)[:, None, None, None].expand(8, 16, 16, 1) % 5
    one_hot = to_one_hot(labels, 5)
    assert one_hot.shape == (8, 5, 16, 16) and one_hot.sum() == 8 * 16 * 16
    losses = [trainer.step(one_hot, step * 8)["reconstruction"].item() for step in range(40)]
    assert losses[-1] < 0.7 * losses[0]


class Flat(torch.nn.Module):
    """A perceptual distance that is easy to know: the mean squared difference per image."""

    def forward(self, images, reconstructions):
        return (images - reconstructions).square().mean((1, 2, 3))


def test_the_perceptual_term_joins_the_reconstruction_with_its_weight():
    plain = build(discriminator_weight=0.0).step(images(0), 0)["reconstruction"]
    trainer = build(discriminator_weight=0.0, perceptual_weight=2.0)
    trainer.perceptual = Flat()
    metrics = trainer.step(images(0), 0)
    torch.testing.assert_close(metrics["reconstruction"], plain + 2.0 * metrics["perceptual"])


def test_the_result_takes_parameters_from_the_average_and_buffers_as_they_are():
    trainer = build(weight_average_decay=0.9)
    for step in range(3):
        trainer.step(images(step), step * 8)
    result = trainer.averaged_tokenizer()
    assert torch.equal(result.decoder.conv_out.weight, trainer.average.average["decoder.conv_out.weight"])
    assert not torch.equal(result.decoder.conv_out.weight, trainer.tokenizer.decoder.conv_out.weight)
    off = build(weight_average_decay=0.0)
    off.step(images(0), 0)
    assert torch.equal(off.averaged_tokenizer().decoder.conv_out.weight, off.tokenizer.decoder.conv_out.weight)


def test_state_goes_on_bitwise():
    changes = {"lecam_weight": 0.1, "r1_weight": 1.0, "r1_every_steps": 2}
    straight, stopped = build(**changes), build(**changes)
    for step in range(3):
        straight.step(images(step), step * 8)
        stopped.step(images(step), step * 8)
    resumed = build(**changes)
    resumed.load_state_dict(stopped.state_dict())
    for step in range(3, 6):
        a, b = straight.step(images(step), step * 8), resumed.step(images(step), step * 8)
        assert {name: value.item() for name, value in a.items()} == {name: value.item() for name, value in b.items()}
    for a, b in zip(straight.averaged_tokenizer().parameters(), resumed.averaged_tokenizer().parameters()):
        assert torch.equal(a, b)


def test_weight_average_follows_its_formula():
    module = torch.nn.Linear(1, 1, bias=False)
    average = WeightAverage(module, 0.9)
    with torch.no_grad():
        module.weight += 1.0
    start = average.average["weight"].clone()
    average.update(module)
    decay = 2 / 11  # the short memory of the first step
    torch.testing.assert_close(average.average["weight"], decay * start + (1 - decay) * module.weight)
