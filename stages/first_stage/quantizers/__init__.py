"""Quantizers: encoder features to codes and back. One small contract (`base.py`), one module per family, one registry."""

from collections.abc import Callable

from stages.first_stage.quantizers.base import Quantized, Quantizer
from stages.first_stage.quantizers.binary import BinaryQuantizer, SphericalBinaryQuantizer
from stages.first_stage.quantizers.ema import AverageQuantizer
from stages.first_stage.quantizers.fsq import ScalarQuantizer
from stages.first_stage.quantizers.gumbel import GumbelQuantizer
from stages.first_stage.quantizers.ibq import IndexQuantizer
from stages.first_stage.quantizers.vq import LinearQuantizer, SphericalQuantizer, VectorQuantizer

__all__ = ["QUANTIZERS", "Quantized", "Quantizer", "build_quantizer"]

# By the name in tokenizer.quantizer; arguments: codebook_size, codebook_dim, levels.
QUANTIZERS: dict[str, Callable[[int, int, tuple[int, ...]], Quantizer]] = {
    "vq": lambda size, dim, levels: VectorQuantizer(size, dim),
    "vq-l2": lambda size, dim, levels: SphericalQuantizer(size, dim),
    "vq-ema": lambda size, dim, levels: AverageQuantizer(size, dim),
    "simvq": lambda size, dim, levels: LinearQuantizer(size, dim),
    "ibq": lambda size, dim, levels: IndexQuantizer(size, dim),
    "gumbel": lambda size, dim, levels: GumbelQuantizer(size, dim),
    "fsq": lambda size, dim, levels: ScalarQuantizer(levels),
    "lfq": lambda size, dim, levels: BinaryQuantizer(dim),
    "bsq": lambda size, dim, levels: SphericalBinaryQuantizer(dim),
}


def build_quantizer(kind: str, codebook_size: int, codebook_dim: int, levels: tuple[int, ...] = ()) -> Quantizer:
    """The quantizer of this name in QUANTIZERS.

    Args:
        kind: its name.
        codebook_size: number of codes.
        codebook_dim: width of a code vector.
        levels: of "fsq" only.

    Raises:
        ValueError: no such kind, or one that has another size or width.
    """
    if kind not in QUANTIZERS:
        raise ValueError(f"quantizer is {kind}, but it must be one of: {', '.join(QUANTIZERS)}")
    quantizer = QUANTIZERS[kind](codebook_size, codebook_dim, levels)
    if (quantizer.codebook_size, quantizer.codebook_dim) != (codebook_size, codebook_dim):
        raise ValueError(
            f"quantizer {kind} has {quantizer.codebook_size} codes of {quantizer.codebook_dim} dimensions, but "
            f"{codebook_size} of {codebook_dim} are declared"
        )
    return quantizer
