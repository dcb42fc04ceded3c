"""Bit packing of codes: little-endian, ceil(log2 codebook_size) bits each, rows padded to whole bytes."""

import numpy as np

from stages.errors import ConfigError

MAX_BITS = 16


def num_bits(codebook_size: int) -> int:
    """Bits per code.

    Raises:
        ConfigError: the codes column cannot hold so large a codebook.
    """
    bits = max(1, (codebook_size - 1).bit_length())
    if bits > MAX_BITS:
        raise ConfigError(
            f"tokenizer.codebook_size is {codebook_size}, which needs {bits} bits per code, but the codes column holds at "
            f"most {MAX_BITS}. Use at most {1 << MAX_BITS}."
        )
    return bits


def bytes_per_row(num_codes: int, bits: int) -> int:
    """Bytes of one packed row."""
    return (num_codes * bits + 7) // 8


def pack(codes_NL: np.ndarray, bits: int) -> np.ndarray:
    """Codes (N, L), each in [0, 2^bits), to uint8 (N, bytes_per_row). Code i starts at bit i * bits, lowest bit first.

    Raises:
        ValueError: a code does not fit.
    """
    if codes_NL.size and not (0 <= codes_NL.min() and codes_NL.max() < 1 << bits):
        raise ValueError(
            f"codes span [{codes_NL.min()}, {codes_NL.max()}], but {bits} bits hold [0, {(1 << bits) - 1}]"
        )
    each_bit = (codes_NL.astype(np.uint32)[..., None] >> np.arange(bits, dtype=np.uint32)).astype(np.uint8) & 1
    return np.packbits(each_bit.reshape(len(codes_NL), codes_NL.shape[1] * bits), axis=1, bitorder="little")


def unpack(packed_NB: np.ndarray, num_codes: int, bits: int) -> np.ndarray:
    """uint8 (N, bytes_per_row) back to int64 codes (N, num_codes).

    A code of at most 16 bits lies within three bytes, wherever it starts.
    """
    first_bit = np.arange(num_codes) * bits
    first_byte, shift = first_bit >> 3, (first_bit & 7).astype(np.uint32)
    padded = np.zeros((len(packed_NB), packed_NB.shape[1] + 2), dtype=np.uint32)
    padded[:, :-2] = packed_NB
    window = padded[:, first_byte] | (padded[:, first_byte + 1] << 8) | (padded[:, first_byte + 2] << 16)
    return ((window >> shift) & np.uint32((1 << bits) - 1)).astype(np.int64)
