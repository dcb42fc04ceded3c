import io

import numpy as np
import pyarrow.parquet as pq
import pytest
import xxhash

from pipeline.code_dataset import parts
from pipeline.code_dataset.codec import pack, unpack
from pipeline.code_dataset.parts import DUPLICATES_SCHEMA, SOURCE_SHA256, RowFormat, encode_part, encode_rows, make_rows

FORMAT = RowFormat(num_codes=6, codebook_size=1000, has_labels=True, conditions=("depth",))


def contents(n, row_format):
    """Of n rows, by argument of `make_rows`."""
    random = np.random.default_rng(n)
    shape = (n, row_format.num_codes)
    return {
        "codes": random.integers(0, row_format.codebook_size, shape),
        "image_ids": random.integers(0, 2**62, n),
        "views": random.integers(0, 2, n),
        "crops": random.uniform(0, 500, (n, 4)).astype(np.float32),
        "is_flipped": random.integers(0, 2, n) > 0,
        "source_sha256": random.integers(0, 256, (n, 32)).astype(np.uint8),
        "labels": random.integers(-1, 10, n) if row_format.has_labels else None,
        "conditions": {name: random.integers(0, 256, shape).astype(np.uint8) for name in row_format.conditions},
    }


def table(n, row_format=FORMAT):
    return make_rows(row_format, **contents(n, row_format)).drop_columns([SOURCE_SHA256])


def bytes_of(column, width):
    return np.frombuffer(b"".join(column.to_pylist()), np.uint8).reshape(-1, width)


@pytest.mark.parametrize("has_labels, conditions", [(True, ("depth", "edges")), (False, ())])
@pytest.mark.parametrize("n", [1, 63, 64, 65, 1000])
def test_any_parquet_reader_sees_the_rows(n, has_labels, conditions):
    row_format = RowFormat(num_codes=6, codebook_size=1000, has_labels=has_labels, conditions=conditions)
    expected = contents(n, row_format)
    data, _ = encode_part(make_rows(row_format, **expected), row_format, 64)
    found = pq.read_table(io.BytesIO(data), page_checksum_verification=True)
    np.testing.assert_array_equal(unpack(bytes_of(found["codes"], 8), 6, 10), expected["codes"])
    for column, name in {"image_id": "image_ids", "view": "views", "is_flipped": "is_flipped"}.items():
        np.testing.assert_array_equal(found[column].to_numpy(), expected[name])
    crops = np.stack([found[f"crop_{side}"].to_numpy() for side in ("left", "top", "width", "height")], axis=1)
    np.testing.assert_array_equal(crops, expected["crops"])
    np.testing.assert_array_equal(bytes_of(found[SOURCE_SHA256], 32), expected["source_sha256"])
    for name in conditions:
        np.testing.assert_array_equal(bytes_of(found[name], 6), expected["conditions"][name])
    assert ("label" in found.column_names) == has_labels
    if has_labels:
        np.testing.assert_array_equal(found["label"].to_numpy(), expected["labels"])
    assert not any(field.nullable for field in found.schema)


def test_a_row_is_a_byte_offset():
    expected = contents(200, FORMAT)
    data, groups = encode_part(table(200), FORMAT, 64)
    assert [group["rows"] for group in groups] == [64, 64, 64, 8]
    assert FORMAT.addressed == {"label": 4, "depth": 6, "codes": 8}
    packed = pack(expected["codes"], 10)
    for row in (0, 63, 64, 199):
        columns = groups[row // 64]["columns"]
        start = {name: columns[name]["offset"] + row % 64 * width for name, width in FORMAT.addressed.items()}
        assert data[start["codes"] :][:8] == packed[row].tobytes()
        assert data[start["depth"] :][:6] == expected["conditions"]["depth"][row].tobytes()
        assert int.from_bytes(data[start["label"] :][:4], "little", signed=True) == expected["labels"][row]


def test_every_column_of_a_row_group_has_the_hash_of_its_bytes():
    data, groups = encode_part(table(200), FORMAT, 64)
    assert all(list(group["columns"]) == FORMAT.schema.names for group in groups)
    ranges = []
    for column in (column for group in groups for column in group["columns"].values()):
        start, stop = column["offset"], column["offset"] + column["bytes"]
        assert xxhash.xxh3_64_hexdigest(data[start:stop]) == column["xxh3_64"]
        ranges.append((start, stop))
    ranges.sort()
    assert all(stop <= start for (_, stop), (start, _) in zip(ranges, ranges[1:])), "no two columns share bytes"


def test_a_row_is_little_more_than_its_codes_and_label():
    n, row_format = 1 << 15, RowFormat(num_codes=256, codebook_size=1024, has_labels=True)
    rows = contents(n, row_format) | {
        "image_ids": np.arange(n),
        "views": np.zeros(n, int),
        "crops": np.tile(np.array([40, 0, 256, 256], np.float32), (n, 1)),
        "is_flipped": np.zeros(n, bool),
    }
    part = make_rows(row_format, **rows).drop_columns([SOURCE_SHA256])
    data, groups = encode_part(part, row_format, row_format.row_group_rows())
    assert len(data) / n <= 320 * 1.001 + 4 + 1
    assert [group["columns"]["codes"]["bytes"] for group in groups] == [16_384 * 320] * 2


@pytest.mark.parametrize(
    "num_codes, codebook_size, rows",
    [(64, 1024, 16_384), (256, 1024, 16_384), (256, 16_384, 16_384), (512, 1024, 8_192), (1 << 16, 65_536, 64)],
)
def test_row_groups_are_a_power_of_two_of_at_most_8_mib_of_codes(num_codes, codebook_size, rows):
    row_format = RowFormat(num_codes=num_codes, codebook_size=codebook_size, has_labels=False)
    assert row_format.row_group_rows() == rows
    assert rows * row_format.bytes_per_row <= 8 << 20


def test_a_row_group_holds_at_least_one_row():
    assert RowFormat(num_codes=10_000_000, codebook_size=1024, has_labels=False).row_group_rows() == 1


def test_the_same_rows_give_the_same_bytes():
    whole = table(100)
    assert encode_part(whole, FORMAT, 64) == encode_part(table(100), FORMAT, 64)
    pieces = parts.pa.concat_tables([whole.slice(0, 37), whole.slice(37)])
    assert encode_part(pieces.combine_chunks(), FORMAT, 64) == encode_part(whole, FORMAT, 64)


@pytest.mark.parametrize("code", [-1, 1000])
def test_a_code_outside_the_codebook_is_refused(code):
    expected = contents(10, FORMAT)
    expected["codes"][3, 2] = code
    with pytest.raises(ValueError, match="codebook has 1000"):
        make_rows(FORMAT, **expected)


@pytest.mark.parametrize("change", [{"max_rows_per_page": 10}, {"use_dictionary": ["label"]}, {"compression": "ZSTD"}])
def test_a_writer_that_lays_pages_out_otherwise_is_noticed(change, monkeypatch):
    write_table = parts.pq.write_table

    def write_otherwise(*arguments, **options):
        encodings = {name: "PLAIN" for name in FORMAT.addressed if name not in change.get("use_dictionary", ())}
        write_table(*arguments, **{**options, **change, "column_encoding": encodings})

    monkeypatch.setattr(parts.pq, "write_table", write_otherwise)
    with pytest.raises(RuntimeError, match="row-addressed"):
        encode_part(table(100), FORMAT, 64)


def test_flipped_bits_in_pages_fail_the_page_checksum():
    data, groups = encode_part(table(100), FORMAT, 64)
    for name in ("codes", "label", "depth", "image_id"):
        column = groups[0]["columns"][name]
        damaged = bytearray(data)
        damaged[column["offset"] + column["bytes"] - 1] ^= 1
        with pytest.raises(OSError, match="(?i)crc"):
            pq.read_table(io.BytesIO(bytes(damaged)), page_checksum_verification=True)


def test_small_files_are_read_back():
    rows = [{"image_id": 7, "first_image_id": 3, "sha256": "0" * 64}]
    assert pq.read_table(io.BytesIO(encode_rows(rows, DUPLICATES_SCHEMA))).to_pylist() == rows
