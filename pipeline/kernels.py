"""Compiled loops over packed rows. They take addresses, so that rows of many memory-mapped files are gathered in one call.

A row group is `1 << group_shift` rows that lie one after another; `addresses[g]` is where group g starts in memory. The caller
keeps that memory mapped, with at least `READ_AHEAD` readable bytes after the last row, and passes only rows that exist.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba import njit, types
from numba.extending import intrinsic

READ_AHEAD = 16  # codes are loaded eight bytes at a time, so a kernel may look past the end of a row
PREFETCH_ROWS = 8  # random rows are asked for this many rows before they are needed
CACHE_LINE = 64


def _load(value_type: Any) -> Any:
    """Makes a function of an address that loads an unsigned integer from there, aligned or not."""

    def load(typing_context: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            pointer = builder.inttoptr(arguments[0], ir.IntType(value_type.bitwidth).as_pointer())
            instruction = builder.load(pointer)
            instruction.align = 1
            return instruction

        return value_type(types.uint64), generate

    return intrinsic(load)


def _make_prefetch() -> Any:
    """Makes a function of an address that asks for its cache line, and never faults."""

    def prefetch(typing_context: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            flag, pointer = ir.IntType(32), ir.IntType(8).as_pointer()
            kind = ir.FunctionType(ir.VoidType(), [pointer, flag, flag, flag])
            function = builder.module.declare_intrinsic("llvm.prefetch", [pointer], kind)
            read, keep, data = flag(0), flag(3), flag(1)
            builder.call(function, [builder.inttoptr(arguments[0], pointer), read, keep, data])
            return context.get_dummy_value()

        return types.void(types.uint64), generate

    return intrinsic(prefetch)


def _make_deposit() -> Any:
    """Makes a function of a word and a mask that spreads the word's low bits over the mask's ones (x86: PDEP)."""

    def deposit(typing_context: Any, word: Any, mask: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            word_type = ir.IntType(64)
            kind = ir.FunctionType(word_type, [word_type, word_type])
            return builder.call(builder.module.declare_intrinsic("llvm.x86.bmi.pdep.64", (), kind), arguments)

        return types.uint64(types.uint64, types.uint64), generate

    return intrinsic(deposit)


_load_u8, _load_u64, _prefetch = _load(types.uint8), _load(types.uint64), _make_prefetch()
_deposit = _make_deposit()
HAS_DEPOSIT = bool(get_host_cpu_features().get("bmi2"))


@njit(nogil=True, inline="always")
def _spread_in_halves(four_codes: np.uint64, bits: int) -> np.uint64:
    """Four codes of `bits` bits, side by side from the lowest bit, to four lanes of 16 bits: halves first, then quarters."""
    two, one = np.uint64((1 << (2 * bits)) - 1), np.uint64((1 << bits) - 1)
    halves = (four_codes & two) | (((four_codes >> np.uint64(2 * bits)) & two) << np.uint64(32))
    lanes = one | (one << np.uint64(32))
    return (halves & lanes) | (((halves >> np.uint64(bits)) & lanes) << np.uint64(16))


@njit(nogil=True, inline="always")
def _spread_at_once(four_codes: np.uint64, bits: int) -> np.uint64:
    """`_spread_in_halves` in one instruction."""
    return _deposit(four_codes, np.uint64((1 << bits) - 1) * np.uint64(0x0001000100010001))


_spread = _spread_at_once if HAS_DEPOSIT else _spread_in_halves


@njit(nogil=True, inline="always")
def _unpack_row(address: np.uint64, bits: int, num_codes: int, out: np.ndarray, words: np.ndarray, start: int) -> None:
    """One row of codes into `out` from index `start`, a multiple of 4. `words` is `out` seen as uint64, four codes each."""
    half_byte, half_shift = np.uint64((4 * bits) >> 3), np.uint64((4 * bits) & 7)
    word = start >> 2
    for block in range(num_codes // 8):
        words[word + 2 * block] = _spread(_load_u64(address), bits)
        words[word + 2 * block + 1] = _spread(_load_u64(address + half_byte) >> half_shift, bits)
        address += np.uint64(bits)
    for i in range(num_codes // 8 * 8, num_codes):
        first = np.uint64((i & 7) * bits)
        held = _load_u64(address + (first >> np.uint64(3))) >> (first & np.uint64(7))
        out[start + i] = held & np.uint64((1 << bits) - 1)


@njit(nogil=True, cache=True)
def gather_codes(
    addresses: np.ndarray,
    rows: np.ndarray,
    group_shift: int,
    num_codes: int,
    row_bytes: int,
    bits: int,
    original: np.ndarray,
    out_NL: np.ndarray,
) -> None:
    """Unpacks rows of packed codes.

    Args:
        addresses: uint64 (num_groups,).
        rows: int64 (N,).
        group_shift: log2 of the rows per group.
        num_codes: L.
        row_bytes: of one packed row.
        bits: per code, 1 to 16.
        original: uint16, the code that each stored code stands for; empty if codes are stored as they are.
        out_NL: uint16 (N, L rounded up to a multiple of 4), C-contiguous; the first L of each row are filled.
    """
    mask, width = (1 << group_shift) - 1, out_NL.shape[1]
    out = out_NL.reshape(-1)  # flat: a view per row would cost as much as the row
    words = out.view(np.uint64)
    for i in range(len(rows)):
        if i + PREFETCH_ROWS < len(rows):
            ahead = rows[i + PREFETCH_ROWS]
            start = addresses[ahead >> group_shift] + np.uint64((ahead & mask) * row_bytes)
            for line in range(0, row_bytes, CACHE_LINE):
                _prefetch(start + np.uint64(line))
        row = rows[i]
        address = addresses[row >> group_shift] + np.uint64((row & mask) * row_bytes)
        _unpack_row(address, bits, num_codes, out, words, i * width)
        if len(original):
            for j in range(i * width, i * width + num_codes):
                out[j] = original[out[j]]


@njit(nogil=True, cache=True)
def span(values: np.ndarray) -> tuple[int, int]:
    """Smallest and largest of int64 values, of which there is at least one."""
    low = high = values[0]
    for value in values:
        low, high = min(low, value), max(high, value)
    return low, high


@njit(nogil=True, cache=True)
def first_absent(addresses: np.ndarray, rows: np.ndarray, group_shift: int) -> int:
    """The group of the first row whose group has no address yet; -1 if all have one."""
    for row in rows:
        if addresses[row >> group_shift] == 0:
            return row >> group_shift
    return -1


@njit(nogil=True, cache=True)
def gather_bytes(addresses: np.ndarray, rows: np.ndarray, group_shift: int, row_bytes: int, out_NB: np.ndarray) -> None:
    """Copies rows of a fixed-width column into `out_NB`, uint8 (N, row_bytes). Other arguments as for `gather_codes`."""
    mask = (1 << group_shift) - 1
    for i in range(len(rows)):
        row = rows[i]
        address = addresses[row >> group_shift] + np.uint64((row & mask) * row_bytes)
        for byte in range(row_bytes):
            out_NB[i, byte] = _load_u8(address + np.uint64(byte))


@njit(nogil=True, cache=True)
def pack_codes(codes_NL: np.ndarray, bits: int, out_NB: np.ndarray) -> None:
    """Packs codes, each below 2^bits, into zeroed rows uint8 (N, ceil(L * bits / 8)), lowest bit first."""
    for i in range(codes_NL.shape[0]):
        held, num_held, byte = np.uint64(0), 0, 0
        for code in codes_NL[i]:
            held |= np.uint64(code) << np.uint64(num_held)
            num_held += bits
            while num_held >= 8:
                out_NB[i, byte] = held & np.uint64(255)
                held >>= np.uint64(8)
                num_held -= 8
                byte += 1
        if num_held:
            out_NB[i, byte] = held & np.uint64(255)
