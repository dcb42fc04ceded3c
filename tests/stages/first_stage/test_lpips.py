"""LPIPS: the original's arithmetic, frozen and in eval mode for good, and never on weights that nobody named."""

import pytest
import torch
from oracles import taming
from torch import nn

from stages.errors import ConfigError
from stages.first_stage.lpips import BLOCKS, WIDTHS, Lpips


def random_weights(seed=0):
    """A VGG16 under torchvision's names, and heads, of random weights."""
    generator, vgg, inputs = torch.Generator().manual_seed(seed), {}, 3
    for block, width in zip(BLOCKS, WIDTHS):
        for position in block:
            scale = (2 / (9 * inputs)) ** 0.5
            vgg[f"features.{position}.weight"] = torch.randn(width, inputs, 3, 3, generator=generator) * scale
            vgg[f"features.{position}.bias"] = torch.randn(width, generator=generator) * 0.1
            inputs = width
    heads = {
        f"lin{i}.model.1.weight": torch.rand(1, width, 1, 1, generator=generator) for i, width in enumerate(WIDTHS)
    }
    return vgg, heads


@pytest.fixture(scope="module")
def weights():
    return random_weights()


@pytest.fixture(scope="module")
def network(weights):
    return Lpips(*weights)


def pairs(channels=3):
    generator = torch.Generator().manual_seed(1)
    return (torch.rand(2, channels, 32, 32, generator=generator) * 2 - 1 for _ in range(2))


def test_distance_and_gradient_are_those_of_the_original(weights, network):
    vgg, heads = weights
    original = taming("modules.losses.lpips").LPIPS().eval()
    slices = {int(p): f"net.slice{i}.{p}" for i, block in enumerate(BLOCKS, 1) for p in block}
    named = {f"{slices[int(name.split('.')[1])]}.{name.split('.')[2]}": tensor for name, tensor in vgg.items()}
    missing, unexpected = original.load_state_dict({**named, **heads}, strict=False)
    assert not unexpected and all("scaling_layer" in name for name in missing)
    for channels in (3, 1):
        images, reconstructions = pairs(channels)
        ours, theirs = (reconstructions.clone().requires_grad_() for _ in range(2))
        a, b = network(images, ours), original(images, theirs).flatten()
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        a.sum().backward()
        b.sum().backward()
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)


def test_train_mode_of_a_module_around_it_changes_nothing(network):
    """The original's heads have dropout, which its parent's .train() switches on: two calls differ there."""
    outer = nn.Sequential(network)
    images, reconstructions = pairs()
    expected = network(images, reconstructions)
    outer.train()
    assert all(torch.equal(network(images, reconstructions), expected) for _ in range(3))
    assert not any(isinstance(module, nn.Dropout) for module in network.modules())


def test_it_is_frozen_and_gradients_flow_through_it(network):
    images, reconstructions = pairs()
    reconstructions.requires_grad_()
    network(images, reconstructions).sum().backward()
    assert reconstructions.grad.abs().sum() > 0
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in network.parameters())


def test_the_same_image_has_distance_zero_also_where_features_vanish(network):
    images, _ = pairs()
    black = torch.full_like(images, -1.0).requires_grad_()
    assert network(images, images).abs().max() == 0.0
    network(images, black).sum().backward()
    assert torch.isfinite(black.grad).all()


def test_bf16_is_close_and_the_distance_is_float32(network):
    images, reconstructions = pairs()
    exact = network(images, reconstructions)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = network(images, reconstructions)
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, exact, rtol=0.03, atol=0.0)


def test_names_of_a_compvis_checkpoint_serve_as_well(weights, network):
    vgg, heads = weights
    blocks = {str(p): i for i, block in enumerate(BLOCKS, 1) for p in block}
    prefix = "loss.perceptual_loss."
    renamed = {
        f"{prefix}net.slice{blocks[name.split('.')[1]]}.{name.removeprefix('features.')}": t for name, t in vgg.items()
    }
    whole = {**renamed, **{prefix + name: t for name, t in heads.items()}, "encoder.conv_in.weight": torch.zeros(1)}
    images, reconstructions = pairs()
    assert torch.equal(Lpips(whole)(images, reconstructions), network(images, reconstructions))


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda vgg, heads: vgg.pop("features.28.weight"), ["perceptual_vgg", "has no features.28.weight"]),
        (lambda vgg, heads: vgg.update({"features.0.bias": torch.zeros(3)}), ["perceptual_vgg", "has a (3,)"]),
        (lambda vgg, heads: heads.pop("lin4.model.1.weight"), ["perceptual_heads", "has no lin4.model.1.weight"]),
    ],
)
def test_missing_weights_are_an_error_not_random_numbers(weights, change, words):
    vgg, heads = dict(weights[0]), dict(weights[1])
    change(vgg, heads)
    with pytest.raises(ConfigError) as caught:
        Lpips(vgg, heads)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_heads_must_be_somewhere(weights):
    with pytest.raises(ConfigError, match="perceptual_heads has no lin0"):
        Lpips(weights[0])
