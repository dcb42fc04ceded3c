"""Small quantizers of every kind, and features for them."""

import torch

from stages.first_stage.quantizers import Quantizer, build_quantizer

# codebook_size, codebook_dim, levels
QUANTIZER_SHAPES = {
    "vq": (16, 4, ()),
    "vq-l2": (16, 4, ()),
    "vq-ema": (16, 4, ()),
    "simvq": (16, 4, ()),
    "ibq": (16, 4, ()),
    "gumbel": (16, 4, ()),
    "fsq": (60, 3, (4, 3, 5)),
    "lfq": (16, 4, ()),
    "bsq": (16, 4, ()),
}


def quantizer_of(kind: str, seed: int = 1) -> Quantizer:
    """A quantizer of this kind, its entries spread out."""
    torch.manual_seed(seed)
    quantizer = build_quantizer(kind, *QUANTIZER_SHAPES[kind])
    if kind in ("vq", "vq-ema"):  # those that start on one spot
        quantizer.start(torch.randn(100, 4))
    return quantizer


def features(quantizer: Quantizer, seed: int = 3) -> torch.Tensor:
    """(3, D, 5, 4), standard normal."""
    return torch.randn(3, quantizer.codebook_dim, 5, 4, generator=torch.Generator().manual_seed(seed))
