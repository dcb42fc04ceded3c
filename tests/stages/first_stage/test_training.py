"""The first-stage trainer on tiny images: it learns, the two players stay apart, and it goes on exactly from its state."""

import dataclasses

import pytest
import torch
from tests_support import TINY_TOKENIZER

from stages.errors import ConfigError
from stages.first_stage.discriminator import PatchDiscriminator, build_discriminator, smallest_image
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


def build(options=OPTIONS):
    torch.manual_seed(0)
    return FirstStageTrainer(Tokenizer(TINY_TOKENIZER), build_discriminator(options, 3, 16), options)


def images(seed):
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(8, 3, 1, 1, generator=generator) * 2 - 1).expand(8, 3, 16, 16).contiguous()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_reconstruction_improves(precision):
    trainer = build(dataclasses.replace(OPTIONS, precision=precision, discriminator_weight=0.0, learning_rate=1e-3))
    losses = [trainer.step(images(step), step * 8)["reconstruction"].item() for step in range(120)]
    assert sum(losses[-10:]) < 0.6 * sum(losses[:10])


def test_discriminator_learns_before_its_term_is_switched_on():
    trainer = build(dataclasses.replace(OPTIONS, discriminator_start_samples=10**6))
    before = trainer.discriminator.main[0].weight.clone()
    metrics = trainer.step(images(0), 0)
    assert "generator" not in metrics and metrics["discriminator"] > 0
    assert not torch.equal(before, trainer.discriminator.main[0].weight)


def test_generator_pass_leaves_no_gradient_on_the_discriminator():
    trainer = build()
    trainer._discriminator_step = lambda *args: {}
    trainer.step(images(0), 0)
    assert all(p.grad is None and p.requires_grad for p in trainer.discriminator.parameters())


def test_state_goes_on_bitwise():
    straight, stopped = build(), build()
    for step in range(3):
        straight.step(images(step), step * 8)
        stopped.step(images(step), step * 8)
    resumed = build()
    resumed.load_state_dict(stopped.state_dict())
    for step in range(3, 6):
        a, b = straight.step(images(step), step * 8), resumed.step(images(step), step * 8)
        assert a["reconstruction"].item() == b["reconstruction"].item()
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


@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_smallest_image_leaves_exactly_one_patch(num_layers):
    side = smallest_image(num_layers)
    network = PatchDiscriminator(3, 8, num_layers)
    assert network(torch.zeros(1, 3, side, side)).shape == (1, 1, 1, 1)
    with pytest.raises(RuntimeError):
        network(torch.zeros(1, 3, side - 1, side - 1))


def test_an_image_without_a_patch_is_refused():
    with pytest.raises(ConfigError, match="discriminator_layers is 3"):
        build_discriminator(dataclasses.replace(OPTIONS, discriminator_layers=3), 3, 16)
