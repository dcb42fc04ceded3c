"""Vision transformers whose features metrics are defined on: DINOv2 and the image side of CLIP.

One network serves both. Its parameters are named as in DINOv2's published weights (Oquab et al. 2023); `clip_to_vit`
renames those of CLIP (Radford et al. 2021). Depth and widths follow from the weights.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEAD_DIM = 64  # of every published size
DINOV2_OFFSET = 0.1  # DINOv2 resizes its position embedding by (side + 0.1) / stored side


class Attention(nn.Module):
    """Multi-head self-attention over x (n, T, D)."""

    def __init__(self, width: int):
        super().__init__()
        self.num_heads = width // HEAD_DIM
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, HEAD_DIM)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Scale(nn.Module):
    """One factor per channel (LayerScale, Touvron et al. 2021)."""

    def __init__(self, width: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Mlp(nn.Module):
    """Two linear layers with a GELU, exact or with CLIP's approximation x sigmoid(1.702 x)."""

    def __init__(self, width: int, is_quick: bool):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)
        self.is_quick = is_quick

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        return self.fc2(x * torch.sigmoid(1.702 * x) if self.is_quick else F.gelu(x))


class Block(nn.Module):
    """Pre-norm attention and MLP, scaled per channel in DINOv2."""

    def __init__(self, width: int, is_clip: bool):
        super().__init__()
        eps = 1e-5 if is_clip else 1e-6
        self.norm1, self.norm2 = nn.LayerNorm(width, eps), nn.LayerNorm(width, eps)
        self.attn, self.mlp = Attention(width), Mlp(width, is_quick=is_clip)
        self.ls1, self.ls2 = (nn.Identity() if is_clip else Scale(width) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class VisionTransformer(nn.Module):
    """Images float (n, 3, side, side) to the class token's features (n, D), projected to (n, E) in CLIP.

    Args:
        weights: parameters of DINOv2, or of CLIP as `clip_to_vit` gives them; shapes decide the architecture.
        is_clip: which of the two.

    Raises:
        KeyError, RuntimeError: parameters are missing, left over or of the wrong shape.
    """

    def __init__(self, weights: dict[str, Tensor], is_clip: bool):
        super().__init__()
        width, _, self.patch, _ = weights["patch_embed.proj.weight"].shape
        depth = sum(name.endswith(".attn.qkv.weight") for name in weights)
        self.is_clip = is_clip
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, self.patch, stride=self.patch, bias=not is_clip)})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros_like(weights["pos_embed"]))
        self.norm_pre = nn.LayerNorm(width) if is_clip else nn.Identity()
        self.blocks = nn.ModuleList(Block(width, is_clip) for _ in range(depth))
        self.norm = nn.LayerNorm(width, 1e-5 if is_clip else 1e-6)
        self.head = nn.Linear(width, weights["head.weight"].shape[0], bias=False) if is_clip else nn.Identity()
        self.num_features = weights["head.weight"].shape[0] if is_clip else width
        self.load_state_dict(weights, strict=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed["proj"](x).flatten(2).transpose(1, 2)
        side = math.isqrt(x.shape[1])
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self._positions(side)
        x = self.norm_pre(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[:, 0]))

    def _positions(self, side: int) -> Tensor:
        """The position embedding for a grid of that side, (1, 1 + side^2, D)."""
        stored = math.isqrt(self.pos_embed.shape[1] - 1)
        if side == stored:
            return self.pos_embed
        grid = self.pos_embed[:, 1:].unflatten(1, (stored, stored)).permute(0, 3, 1, 2)
        factor = (side + DINOV2_OFFSET) / stored
        grid = F.interpolate(grid, scale_factor=(factor, factor), mode="bicubic")
        return torch.cat([self.pos_embed[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)


def dinov2_to_vit(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """DINOv2's published weights without the mask token, which only training uses."""
    return {name: tensor.float() for name, tensor in weights.items() if name != "mask_token"}


CLIP_NAMES = {
    "conv1.weight": "patch_embed.proj.weight",
    "ln_pre.": "norm_pre.",
    "ln_post.": "norm.",
    "transformer.resblocks.": "blocks.",
    ".ln_1.": ".norm1.",
    ".ln_2.": ".norm2.",
    ".attn.in_proj_": ".attn.qkv.",
    ".attn.out_proj.": ".attn.proj.",
    ".mlp.c_fc.": ".mlp.fc1.",
    ".mlp.c_proj.": ".mlp.fc2.",
}


def clip_to_vit(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The image side of CLIP's published weights under the names of `VisionTransformer`, in float32."""
    found = {}
    for name, tensor in weights.items():
        if not name.startswith("visual."):
            continue
        name = name.removeprefix("visual.")
        for theirs, ours in CLIP_NAMES.items():
            name = name.replace(theirs, ours)
        found[name] = tensor.float()
    found["cls_token"] = found.pop("class_embedding")[None, None]
    found["pos_embed"] = found.pop("positional_embedding")[None]
    found["head.weight"] = found.pop("proj").T.contiguous()
    return found
