"""Names and shapes of the weights of small vision transformers, as DINOv2 and CLIP publish theirs."""

WIDTH, PATCH, EMBEDDING = 64, 28, 16


def vit_shapes(is_clip: bool, tokens: int, depth: int = 1) -> dict[str, tuple[int, ...]]:
    """Shapes by name, of CLIP with one tensor of its text side."""
    wide = 4 * WIDTH
    if is_clip:
        layers = {"attn.in_proj_": 3 * WIDTH, "attn.out_proj.": WIDTH, "mlp.c_fc.": wide, "mlp.c_proj.": WIDTH}
        norms, prefix = ("ln_1.", "ln_2."), "visual.transformer.resblocks."
        shapes: dict[str, tuple[int, ...]] = {
            "logit_scale": (),
            "visual.class_embedding": (WIDTH,),
            "visual.positional_embedding": (tokens, WIDTH),
            "visual.conv1.weight": (WIDTH, 3, PATCH, PATCH),
            "visual.proj": (WIDTH, EMBEDDING),
            **{f"visual.ln_{which}.{kind}": (WIDTH,) for which in ("pre", "post") for kind in ("weight", "bias")},
        }
    else:
        layers = {"attn.qkv.": 3 * WIDTH, "attn.proj.": WIDTH, "mlp.fc1.": wide, "mlp.fc2.": WIDTH}
        norms, prefix = ("norm1.", "norm2."), "blocks."
        shapes = {
            "cls_token": (1, 1, WIDTH),
            "pos_embed": (1, tokens, WIDTH),
            "mask_token": (1, WIDTH),
            "patch_embed.proj.weight": (WIDTH, 3, PATCH, PATCH),
            "patch_embed.proj.bias": (WIDTH,),
            "norm.weight": (WIDTH,),
            "norm.bias": (WIDTH,),
            **{f"blocks.{i}.ls{j}.gamma": (WIDTH,) for i in range(depth) for j in (1, 2)},
        }
    for i in range(depth):
        for name, rows in layers.items():
            columns = wide if rows == WIDTH and "mlp" in name else WIDTH
            shapes |= {f"{prefix}{i}.{name}weight": (rows, columns), f"{prefix}{i}.{name}bias": (rows,)}
        shapes |= {f"{prefix}{i}.{norm}{kind}": (WIDTH,) for norm in norms for kind in ("weight", "bias")}
    return shapes
