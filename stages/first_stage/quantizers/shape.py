"""Size and width of the codebook that the tokenizer options ask for. Imports no torch."""

import math

from stages.errors import ConfigError
from stages.options import TokenizerOptions

MAX_BITS = 20
DEFAULT_SIZE, DEFAULT_DIM = 1024, 8
BINARY = ("lfq", "bsq")


def codebook_shape(options: TokenizerOptions) -> tuple[int, int]:
    """codebook_size and codebook_dim, given or implied.

    Raises:
        ConfigError: they contradict each other, or the quantizer.
    """
    if options.fsq_levels and options.quantizer != "fsq":
        raise ConfigError(
            f"tokenizer.fsq_levels is {list(options.fsq_levels)}, but tokenizer.quantizer is {options.quantizer}, which has no "
            f"levels. Leave it out, or use tokenizer.quantizer=fsq."
        )
    if options.quantizer == "fsq":
        return _scalar_shape(options)
    if options.quantizer in BINARY:
        return _binary_shape(options)
    return options.codebook_size or DEFAULT_SIZE, options.codebook_dim or DEFAULT_DIM


def _scalar_shape(options: TokenizerOptions) -> tuple[int, int]:
    levels = list(options.fsq_levels)
    if not levels:
        raise ConfigError(
            "tokenizer.fsq_levels is empty, but tokenizer.quantizer=fsq needs the levels of each dimension. Write e.g. "
            "tokenizer.fsq_levels=[8, 5, 5, 5], which are 1000 codes."
        )
    size, dim = math.prod(levels), len(levels)
    if size > 1 << MAX_BITS:
        raise ConfigError(
            f"tokenizer.fsq_levels is {levels}, but that makes {size} codes and at most {1 << MAX_BITS} are possible. Use fewer levels."
        )
    _agree("codebook_size", options.codebook_size, size, f"fsq_levels={levels} makes")
    _agree("codebook_dim", options.codebook_dim, dim, f"fsq_levels={levels} makes")
    return size, dim


def _binary_shape(options: TokenizerOptions) -> tuple[int, int]:
    """One bit per dimension."""
    kind, size, dim = options.quantizer, options.codebook_size, options.codebook_dim
    if dim is None:
        size = size or DEFAULT_SIZE
        dim = size.bit_length() - 1
        if size != 1 << dim:
            raise ConfigError(
                f"tokenizer.codebook_size is {size}, but tokenizer.quantizer={kind} makes powers of two. Use {1 << dim} or "
                f"{1 << dim + 1}."
            )
    if dim > MAX_BITS:
        raise ConfigError(
            f"tokenizer.codebook_dim is {dim}, but tokenizer.quantizer={kind} makes 2^{dim} codes of it and at most 2^{MAX_BITS} are "
            f"possible. Use at most {MAX_BITS}."
        )
    _agree("codebook_size", size, 1 << dim, f"codebook_dim={dim} with tokenizer.quantizer={kind} makes")
    return 1 << dim, dim


def _agree(key: str, given: int | None, implied: int, cause: str) -> None:
    if given is not None and given != implied:
        raise ConfigError(
            f"tokenizer.{key} is {given}, but tokenizer.{cause} it {implied}. Write tokenizer.{key}=null, or change the other."
        )
