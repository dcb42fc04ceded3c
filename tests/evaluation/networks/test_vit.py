import math

import pytest
import torch
import torch.nn.functional as F
from fidelity_support import fidelity
from torch import nn

from evaluation.networks.vit import VisionTransformer, clip_to_vit, dinov2_to_vit

WIDTH, DEPTH, PATCH, EMBEDDING = 128, 2, 14, 48


def dinov2_weights(side: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights under the names of DINOv2's published files."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) / math.sqrt(shape[-1])

    weights = {
        "cls_token": random(1, 1, WIDTH),
        "pos_embed": random(1, 1 + side**2, WIDTH),
        "mask_token": random(1, WIDTH),
        "patch_embed.proj.weight": random(WIDTH, 3, PATCH, PATCH),
        "patch_embed.proj.bias": random(WIDTH),
        "norm.weight": 1 + random(WIDTH),
        "norm.bias": random(WIDTH),
    }
    for i in range(DEPTH):
        shapes = {"attn.qkv": (3 * WIDTH, WIDTH), "attn.proj": (WIDTH, WIDTH)}
        shapes |= {"mlp.fc1": (4 * WIDTH, WIDTH), "mlp.fc2": (WIDTH, 4 * WIDTH)}
        for name, shape in shapes.items():
            weights |= {f"blocks.{i}.{name}.weight": random(*shape), f"blocks.{i}.{name}.bias": random(shape[0])}
        for name in ("norm1", "norm2"):
            weights |= {f"blocks.{i}.{name}.weight": 1 + random(WIDTH), f"blocks.{i}.{name}.bias": random(WIDTH)}
        weights |= {f"blocks.{i}.ls{j}.gamma": random(WIDTH).abs() for j in (1, 2)}
    return weights


def dinov2_written_out(weights: dict[str, torch.Tensor], x: torch.Tensor, side: int) -> torch.Tensor:
    """The published architecture step by step, with PyTorch's own attention."""
    x = F.conv2d(x, weights["patch_embed.proj.weight"], weights["patch_embed.proj.bias"], stride=PATCH)
    positions = weights["pos_embed"]
    if x.shape[-1] != side:
        grid = positions[:, 1:].reshape(1, side, side, WIDTH).permute(0, 3, 1, 2)
        scale = (x.shape[-1] + 0.1) / side
        grid = F.interpolate(grid, scale_factor=(scale, scale), mode="bicubic").permute(0, 2, 3, 1)
        positions = torch.cat([positions[:, :1], grid.reshape(1, -1, WIDTH)], dim=1)
    x = torch.cat([weights["cls_token"].expand(len(x), 1, WIDTH), x.flatten(2).transpose(1, 2)], dim=1) + positions
    for i in range(DEPTH):
        w = {name.removeprefix(f"blocks.{i}."): t for name, t in weights.items() if name.startswith(f"blocks.{i}.")}
        attention = nn.MultiheadAttention(WIDTH, WIDTH // 64, batch_first=True)
        attention.load_state_dict(
            {
                "in_proj_weight": w["attn.qkv.weight"],
                "in_proj_bias": w["attn.qkv.bias"],
                "out_proj.weight": w["attn.proj.weight"],
                "out_proj.bias": w["attn.proj.bias"],
            }
        )
        y = F.layer_norm(x, (WIDTH,), w["norm1.weight"], w["norm1.bias"], 1e-6)
        x = x + w["ls1.gamma"] * attention(y, y, y, need_weights=False)[0]
        y = F.layer_norm(x, (WIDTH,), w["norm2.weight"], w["norm2.bias"], 1e-6)
        y = F.linear(F.gelu(F.linear(y, w["mlp.fc1.weight"], w["mlp.fc1.bias"])), w["mlp.fc2.weight"], w["mlp.fc2.bias"])
        x = x + w["ls2.gamma"] * y
    return F.layer_norm(x, (WIDTH,), weights["norm.weight"], weights["norm.bias"], 1e-6)[:, 0]


@pytest.mark.parametrize("stored_side", [4, 6])
def test_dinov2_is_the_published_architecture(stored_side):
    weights = dinov2_weights(stored_side)
    network = VisionTransformer(dinov2_to_vit(weights), is_clip=False).eval()
    x = torch.randn(2, 3, 4 * PATCH, 4 * PATCH, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        torch.testing.assert_close(network(x), dinov2_written_out(weights, x, stored_side), rtol=1e-4, atol=1e-5)


def test_clip_equals_openais_module_as_torch_fidelity_carries_it():
    torch.manual_seed(0)
    module = fidelity("feature_extractor_clip").CLIPVisual(EMBEDDING, 4 * PATCH, DEPTH, WIDTH, PATCH).eval()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.1)
    weights = {**module.state_dict(), "logit_scale": torch.ones(())}
    ours = VisionTransformer(clip_to_vit(weights), is_clip=True).eval()
    x = torch.randn(2, 3, 4 * PATCH, 4 * PATCH)
    with torch.inference_mode():
        expected = module.visual(x)
        assert expected.shape == (2, EMBEDDING) == ours(x).shape
        torch.testing.assert_close(ours(x), expected, rtol=1e-4, atol=1e-5)


def test_missing_and_left_over_weights_are_refused():
    weights = dinov2_weights(4)
    with pytest.raises(RuntimeError, match="blocks.1.mlp.fc2.bias"):
        VisionTransformer(dinov2_to_vit({k: v for k, v in weights.items() if k != "blocks.1.mlp.fc2.bias"}), False)
    with pytest.raises(RuntimeError, match="register_tokens"):
        VisionTransformer(dinov2_to_vit({**weights, "register_tokens": torch.zeros(1)}), False)
