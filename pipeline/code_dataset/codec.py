"""Bit packing of codes: little-endian, ceil(log2 codebook_size) bits each, rows padded to whole bytes."""

import numpy as np

from pipeline.kernels import READ_AHEAD, gather_codes, pack_codes
from stages.errors import ConfigError

MAX_BITS = 16
AS_STORED = np.zeros(0, np.uint16)  # no remap


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
    packed = np.zeros((len(codes_NL), bytes_per_row(codes_NL.shape[1], bits)), np.uint8)
    pack_codes(np.ascontiguousarray(codes_NL, np.uint16), bits, packed)
    return packed


def unpack(packed_NB: np.ndarray, num_codes: int, bits: int) -> np.ndarray:
    """uint8 (N, bytes_per_row) back to uint16 codes (N, num_codes)."""
    n, row_bytes = packed_NB.shape
    memory = np.zeros(n * row_bytes + READ_AHEAD, np.uint8)
    memory[: n * row_bytes] = packed_NB.ravel()
    return unpack_rows(np.array([memory.ctypes.data], np.uint64), np.arange(n), 62, num_codes, bits)


def unpack_rows(
    addresses: np.ndarray,
    rows: np.ndarray,
    group_shift: int,
    num_codes: int,
    bits: int,
    original: np.ndarray = AS_STORED,
) -> np.ndarray:
    """uint16 codes (N, num_codes) of packed rows in memory; arguments as for `pipeline.kernels.gather_codes`."""
    width = -(-num_codes // 4) * 4
    codes = np.empty((len(rows), width), np.uint16)
    gather_codes(addresses, rows, group_shift, num_codes, bytes_per_row(num_codes, bits), bits, original, codes)
    return codes[:, :num_codes]
