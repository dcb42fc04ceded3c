"""The compiled loops against arithmetic on whole numbers, which shares nothing with them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import kernels
from pipeline.kernels import READ_AHEAD, gather_bytes, gather_codes, pack_codes

NO_REMAP = np.zeros(0, np.uint16)
shapes = {
    "bits": st.integers(1, 16),
    "num_codes": st.integers(1, 41),
    "group_shift": st.integers(0, 4),
    "num_rows": st.integers(1, 40),
    "seed": st.integers(0, 99),
}


def groups_in_memory(rows_NB, group_shift):
    """Row groups, each in an array of its own, and their addresses."""
    size, groups = 1 << group_shift, []
    for start in range(0, len(rows_NB), size):
        groups.append(np.append(rows_NB[start : start + size].ravel(), np.full(READ_AHEAD, 255, np.uint8)))
    return groups, np.array([group.ctypes.data for group in groups], np.uint64)


def packed_as_numbers(codes_NL, bits):
    row_bytes = -(-codes_NL.shape[1] * bits // 8)
    numbers = [sum(code << (i * bits) for i, code in enumerate(row)) for row in codes_NL.tolist()]
    packed = b"".join(number.to_bytes(row_bytes, "little") for number in numbers)
    return np.frombuffer(packed, np.uint8).reshape(-1, row_bytes)


@settings(max_examples=300)
@given(**shapes, is_remapped=st.booleans())
def test_codes_of_any_rows_in_any_order_are_gathered(bits, num_codes, group_shift, num_rows, seed, is_remapped):
    random = np.random.default_rng(seed)
    codes = random.integers(0, 1 << bits, (num_rows, num_codes))
    packed = packed_as_numbers(codes, bits)
    groups, addresses = groups_in_memory(packed, group_shift)
    rows = random.integers(0, num_rows, 3 * num_rows)
    original = random.permutation(1 << bits).astype(np.uint16) if is_remapped else NO_REMAP
    out = np.zeros((len(rows), -(-num_codes // 4) * 4), np.uint16)
    gather_codes(addresses, rows, group_shift, num_codes, packed.shape[1], bits, original, out)
    expected = original[codes[rows]] if is_remapped else codes[rows]
    np.testing.assert_array_equal(out[:, :num_codes], expected)
    del groups


@given(**shapes)
def test_packing_is_one_little_endian_number_per_row(bits, num_codes, group_shift, num_rows, seed):
    codes = np.random.default_rng(seed).integers(0, 1 << bits, (num_rows, num_codes))
    expected = packed_as_numbers(codes, bits)
    packed = np.zeros_like(expected)
    pack_codes(codes.astype(np.uint16), bits, packed)
    np.testing.assert_array_equal(packed, expected)


@given(width=st.integers(1, 40), group_shift=st.integers(0, 4), num_rows=st.integers(1, 40), seed=st.integers(0, 99))
def test_bytes_of_any_rows_in_any_order_are_gathered(width, group_shift, num_rows, seed):
    random = np.random.default_rng(seed)
    values = random.integers(0, 256, (num_rows, width)).astype(np.uint8)
    groups, addresses = groups_in_memory(values, group_shift)
    rows = random.integers(0, num_rows, 3 * num_rows)
    out = np.zeros((len(rows), width), np.uint8)
    gather_bytes(addresses, rows, group_shift, width, out)
    np.testing.assert_array_equal(out, values[rows])
    del groups


@pytest.mark.skipif(not kernels.HAS_DEPOSIT, reason="this processor has no PDEP")
@pytest.mark.parametrize("bits", range(1, 17))
def test_both_ways_to_spread_four_codes_agree(bits):
    for word in np.random.default_rng(bits).integers(0, 2**64, 20, np.uint64):
        lanes = [(int(word) >> (i * bits)) % 2**bits << (16 * i) for i in range(4)]
        assert kernels._spread_in_halves(word, bits) == kernels._spread_at_once(word, bits) == sum(lanes)
