"""Small tokenizers with random weights, and their tensors as other projects store them."""

import torch

from stages.first_stage.names import is_attention_matrix, renamer
from stages.first_stage.tokenizer import Tokenizer, TokenizerConfig

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
