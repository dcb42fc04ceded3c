"""Small tokenizers with random weights, and their tensors as other projects store them."""

import torch

from stages.first_stage.names import is_attention_matrix, renamer
from stages.first_stage.tokenizer import Tokenizer
from stages.first_stage.tokenizer_config import TokenizerConfig

TINY = dict(
    resolution=256,
    in_channels=3,
    codebook_size=32,
    codebook_dim=4,
    base_channels=32,
    channel_multipliers=(1, 2),
    num_res_blocks=1,
    attention_resolutions=(128,),
    z_channels=16,
)


def tokenizer(seed=0, **changes) -> Tokenizer:
    """A small tokenizer with random weights everywhere, norms included."""
    torch.manual_seed(seed)
    with torch.device("meta"):
        model = Tokenizer(TokenizerConfig(**{**TINY, **changes}))
    model = model.to_empty(device="cpu").eval().requires_grad_(False)
    for tensor in model.state_dict().values():
        tensor.copy_(torch.randn_like(tensor) * 0.1)
    return model


def foreign(model: Tokenizer, format: str) -> dict[str, torch.Tensor]:
    """The tensors as the other project would have stored them, without anything of ours beside them."""
    rename = renamer(format, len(model.config.channel_multipliers))
    is_matrix = {name: format == "diffusers" and is_attention_matrix(name) for name in model.state_dict()}
    return {
        rename(name): t[:, :, 0, 0].clone() if is_matrix[name] else t.clone() for name, t in model.state_dict().items()
    }


def net2net_tensors(block_size, vocabulary, *, width=32, layers=2, seed=5) -> dict[str, torch.Tensor]:
    """The transformer of a CompVis checkpoint by its published names, with random weights."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(shape, generator=generator) * 0.1

    tensors = {
        "pos_emb": random(1, block_size, width),
        "tok_emb.weight": random(vocabulary, width),
        "ln_f.weight": random(width),
        "ln_f.bias": random(width),
        "head.weight": random(vocabulary, width),
    }
    for layer in range(layers):
        block = f"blocks.{layer}"
        mask = torch.ones(block_size, block_size).tril()[None, None]
        tensors[f"{block}.attn.mask"] = mask
        for name in ("ln1", "ln2"):
            tensors |= {f"{block}.{name}.weight": random(width), f"{block}.{name}.bias": random(width)}
        for name in ("key", "query", "value", "proj"):
            tensors |= {f"{block}.attn.{name}.weight": random(width, width), f"{block}.attn.{name}.bias": random(width)}
        tensors |= {f"{block}.mlp.0.weight": random(4 * width, width), f"{block}.mlp.0.bias": random(4 * width)}
        tensors |= {f"{block}.mlp.2.weight": random(width, 4 * width), f"{block}.mlp.2.bias": random(width)}
    return {f"transformer.{name}": tensor for name, tensor in tensors.items()}


def llamagen_tensors(vocabulary, *, num_classes, width=32, layers=2, ffn=64) -> dict[str, torch.Tensor]:
    """LlamaGen's GPT by its published names, with random weights."""
    shapes = {
        "cls_embedding.embedding_table.weight": (num_classes + 1, width),
        "tok_embeddings.weight": (vocabulary, width),
        "norm.weight": (width,),
        "output.weight": (vocabulary, width),
    }
    for layer in range(layers):
        shapes |= {
            f"layers.{layer}.attention.wqkv.weight": (3 * width, width),
            f"layers.{layer}.attention.wo.weight": (width, width),
            f"layers.{layer}.feed_forward.w1.weight": (ffn, width),
            f"layers.{layer}.feed_forward.w3.weight": (ffn, width),
            f"layers.{layer}.feed_forward.w2.weight": (width, ffn),
            f"layers.{layer}.attention_norm.weight": (width,),
            f"layers.{layer}.ffn_norm.weight": (width,),
        }
    generator = torch.Generator().manual_seed(6)
    return {name: torch.randn(shape, generator=generator) * 0.1 for name, shape in shapes.items()}
