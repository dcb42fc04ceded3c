import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.code_dataset.codec import bytes_per_row, num_bits, pack, unpack
from stages.errors import ConfigError


@given(bits=st.integers(1, 16), num_rows=st.integers(0, 5), num_codes=st.integers(1, 40), seed=st.integers(0, 99))
def test_unpack_inverts_pack(bits, num_rows, num_codes, seed):
    codes = np.random.default_rng(seed).integers(0, 1 << bits, (num_rows, num_codes))
    packed = pack(codes, bits)
    assert packed.dtype == np.uint8 and packed.shape == (num_rows, bytes_per_row(num_codes, bits))
    unpacked = unpack(packed, num_codes, bits)
    assert unpacked.dtype == np.uint16
    np.testing.assert_array_equal(unpacked, codes)


@given(bits=st.integers(1, 16), codes=st.lists(st.integers(0, 2**16 - 1), min_size=1, max_size=20))
def test_packing_is_one_little_endian_number(bits, codes):
    """The definition of the format, in arithmetic that shares nothing with the implementation."""
    codes = [code % (1 << bits) for code in codes]
    number = sum(code << (i * bits) for i, code in enumerate(codes))
    assert pack(np.array([codes]), bits).tobytes() == number.to_bytes(bytes_per_row(len(codes), bits), "little")


def test_sizes_of_the_usual_codebooks():
    assert [bytes_per_row(256, num_bits(size)) for size in (1024, 16384)] == [320, 448]
    assert [num_bits(size) for size in (2, 3, 1024, 1025, 65536)] == [1, 2, 10, 11, 16]


def test_a_codebook_larger_than_the_column_is_refused():
    with pytest.raises(ConfigError, match="tokenizer.codebook_size is 65537"):
        num_bits(65537)


@pytest.mark.parametrize("code", [-1, 1024])
def test_a_code_that_does_not_fit_is_refused(code):
    with pytest.raises(ValueError, match="10 bits"):
        pack(np.array([[0, code]]), 10)
