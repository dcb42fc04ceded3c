import io

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline.code_dataset import parts
from pipeline.code_dataset.codec import pack, unpack
from pipeline.code_dataset.parts import PartRows, column_dtypes, encode_part


def rows(n, num_codes=6, codebook_size=1000, has_labels=True):
    random = np.random.default_rng(n)
    return PartRows(
        codes=random.integers(0, codebook_size, (n, num_codes)),
        image_ids=random.integers(0, 2**62, n),
        views=random.integers(0, 2, n),
        labels=random.integers(-1, 10, n) if has_labels else None,
    )


@pytest.mark.parametrize("has_labels", [True, False])
@pytest.mark.parametrize("n", [1, 63, 64, 65, 1000])
def test_any_parquet_reader_sees_the_rows(n, has_labels, monkeypatch):
    monkeypatch.setattr(parts, "ROW_GROUP_ROWS", 64)
    expected = rows(n, has_labels=has_labels)
    data, _ = encode_part(expected, codebook_size=1000)
    table = pq.read_table(io.BytesIO(data), page_checksum_verification=True)
    packed = np.frombuffer(b"".join(table["codes"].to_pylist()), np.uint8).reshape(n, -1)
    np.testing.assert_array_equal(unpack(packed, 6, 10), expected.codes)
    np.testing.assert_array_equal(table["image_id"].to_numpy(), expected.image_ids)
    np.testing.assert_array_equal(table["view"].to_numpy(), expected.views)
    assert ("label" in table.column_names) == has_labels
    assert not any(field.nullable for field in table.schema)


def test_a_row_is_a_byte_offset(monkeypatch):
    monkeypatch.setattr(parts, "ROW_GROUP_ROWS", 64)
    expected = rows(200)
    data, groups = encode_part(expected, codebook_size=1000)
    assert [group["rows"] for group in groups] == [64, 64, 64, 8]
    types = column_dtypes(8, has_labels=True)
    assert list(groups[0]["columns"]) == list(types)
    packed = pack(expected.codes, 10)
    for row in (0, 63, 64, 199):
        columns = groups[row // 64]["columns"]
        at = {name: columns[name]["offset"] + row % 64 * dtype.itemsize for name, dtype in types.items()}
        assert data[at["codes"] :][:8] == packed[row].tobytes()
        assert int.from_bytes(data[at["image_id"] :][:8], "little") == expected.image_ids[row]
        assert int.from_bytes(data[at["label"] :][:4], "little", signed=True) == expected.labels[row]


def test_a_full_row_group_is_one_page():
    data, groups = encode_part(rows(parts.ROW_GROUP_ROWS + 1, num_codes=256, codebook_size=1024), codebook_size=1024)
    assert [group["rows"] for group in groups] == [parts.ROW_GROUP_ROWS, 1]
    assert groups[0]["columns"]["codes"]["bytes"] == parts.ROW_GROUP_ROWS * 320
    assert len(data) < (parts.ROW_GROUP_ROWS + 1) * (320 + 8 + 4 + 4) * 1.001


def test_the_same_rows_give_the_same_bytes():
    assert encode_part(rows(100), 1000) == encode_part(rows(100), 1000)


@pytest.mark.parametrize("codebook_size", [999, 512])
def test_a_code_outside_the_codebook_is_refused(codebook_size):
    expected = rows(10)
    expected.codes[3, 2] = 999
    with pytest.raises(ValueError, match="codebook has"):
        encode_part(expected, codebook_size)


def test_a_writer_that_lays_pages_out_otherwise_is_noticed(monkeypatch):
    write_table = parts.pq.write_table
    monkeypatch.setattr(parts.pq, "write_table", lambda *a, **k: write_table(*a, **{**k, "max_rows_per_page": 10}))
    with pytest.raises(RuntimeError, match="row-addressed"):
        encode_part(rows(100), 1000)


def test_flipped_bits_in_pages_fail_the_page_checksum():
    data, groups = encode_part(rows(100), 1000)
    column = groups[0]["columns"]["codes"]
    damaged = bytearray(data)
    damaged[column["offset"] + 5] ^= 1
    with pytest.raises(OSError, match="(?i)crc"):
        pq.read_table(io.BytesIO(bytes(damaged)), page_checksum_verification=True)
