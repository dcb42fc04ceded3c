"""The patch discriminator: nothing in it depends on other images, leaves traces, or loses precision in its norms."""

import pytest
import torch
from torch import nn

from stages.errors import ConfigError
from stages.first_stage.discriminator import PatchDiscriminator, build_discriminator, smallest_image
from stages.options import TokenizerTrainOptions


@pytest.fixture
def network():
    torch.manual_seed(0)
    return PatchDiscriminator(3, 16, 2).train()


def images(count):
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_logits_of_an_image_do_not_depend_on_the_others(network):
    """With batch normalisation the reconstructions beside them, and the other ranks' images, would matter."""
    batch = images(4)
    alone = torch.cat([network(image[None]) for image in batch])
    torch.testing.assert_close(network(batch), alone, rtol=1e-5, atol=1e-6)


def test_a_pass_leaves_no_trace(network):
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with torch.no_grad():
        network(images(4))
    assert before.keys() == network.state_dict().keys()
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
    assert not list(network.buffers())


def test_norms_are_computed_in_float32_under_autocast(network):
    seen = []
    for module in network.modules():
        if isinstance(module, nn.GroupNorm):
            module.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0].dtype, output.dtype)))
    batch = images(2)
    batch[:, :, 8:] = 30.0  # far from zero, where bf16 loses what the norm is about
    exact = network(batch)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = network(batch)
    assert (torch.bfloat16, torch.bfloat16) in seen
    torch.testing.assert_close(rounded.float(), exact, rtol=0.1, atol=0.02)


def test_it_starts_undecided(network):
    assert network(images(8)).abs().max() < 1.0


@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_smallest_image_leaves_exactly_one_patch(num_layers):
    side = smallest_image(num_layers)
    network = PatchDiscriminator(3, 8, num_layers)
    assert network(torch.zeros(1, 3, side, side)).shape == (1, 1, 1, 1)
    with pytest.raises(RuntimeError):
        network(torch.zeros(1, 3, side - 1, side - 1))


def test_an_image_without_a_patch_is_refused():
    options = TokenizerTrainOptions(discriminator_weight=1.0, discriminator_layers=3)
    with pytest.raises(ConfigError, match="discriminator_layers is 3"):
        build_discriminator(options, 3, 16)


def test_no_weight_no_discriminator():
    assert build_discriminator(TokenizerTrainOptions(discriminator_weight=0.0), 3, 16) is None
