import pytest
import torch
from fidelity_support import fidelity

from evaluation.networks.inception import FidInception


def randomised(network: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Weights and running statistics under which activations keep their scale, so that no layer hides another."""
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(generator=generator).mul_(0.1)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
            module.weight.data.uniform_(0.8, 1.6, generator=generator)
            module.bias.data.normal_(generator=generator).mul_(0.1)
        elif isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            fan_in = module.weight[0].numel()
            module.weight.data.normal_(generator=generator).mul_((2.0 / fan_in) ** 0.5)
    return network.eval()


@pytest.fixture(scope="module")
def ours() -> FidInception:
    return randomised(FidInception(), seed=0)


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randint(0, 256, (2, 3, 299, 299), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def test_equals_torch_fidelitys_with_the_same_weights(ours, images, tmp_path):
    torch.save(ours.state_dict(), tmp_path / "weights.pth")
    theirs = fidelity("feature_extractor_inceptionv3").FeatureExtractorInceptionV3(
        "inception", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(tmp_path / "weights.pth")
    )
    assert theirs.state_dict().keys() == ours.state_dict().keys() and len(ours.state_dict()) == 566
    with torch.inference_mode():
        features, logits = theirs(images)
        found = ours((images.float() - 128) / 128)
        inner = theirs.Conv2d_2b_3x3(theirs.Conv2d_2a_3x3(theirs.Conv2d_1a_3x3((images.float() - 128) / 128)))
        inner = theirs.MaxPool_2(theirs.Conv2d_4a_3x3(theirs.Conv2d_3b_1x1(theirs.MaxPool_1(inner))))
        for name in ("5b", "5c", "5d", "6a", "6b", "6c"):
            inner = getattr(theirs, f"Mixed_{name}")(inner)
        spatial = theirs.Mixed_6d.branch1x1(inner)[:, :7].permute(0, 2, 3, 1).flatten(1)
    assert features.std() > 1e-3
    torch.testing.assert_close(found["features"], features, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found["logits"], logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found["spatial"], spatial, rtol=1e-5, atol=1e-5)


def test_shapes_of_all_outputs(ours, images):
    with torch.inference_mode():
        found = ours(images[:1].float() / 128 - 1)
    assert {name: tuple(value.shape) for name, value in found.items()} == {
        "features": (1, 2048),
        "spatial": (1, 7 * 17 * 17),
        "logits": (1, 1008),
    }
