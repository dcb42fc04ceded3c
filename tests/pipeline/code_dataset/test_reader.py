import tempfile

import numpy as np
import pyarrow.parquet as pq
import pytest
from code_dataset_support import Recipe, files_of, flip_bit
from s3_support import break_store

from pipeline import storage
from pipeline.code_dataset import CodeDataset, compact
from pipeline.code_dataset.parts import CROP_COLUMNS, DESCRIBED
from stages.errors import ArtefactError, StorageError

MANY_PARTS = {"conditions": ("depth", "edges"), "row_group_rows": 4}


@pytest.fixture(params=["local", "s3"])
def place(request, tmp_path):
    return str(tmp_path / "codes") if request.param == "local" else request.getfixturevalue("s3")


@pytest.fixture
def many_parts(place, tmp_path, monkeypatch):
    """Opens a dataset of several parts with several row groups each; with an empty cache every time."""
    monkeypatch.setattr(compact, "MAX_PART_BYTES", 800)
    root = Recipe(**MANY_PARTS).write(place)
    assert len(files_of(root, "data")) > 2
    return lambda verify=False: CodeDataset.open(root, verify=verify, cache_folder=tempfile.mkdtemp(dir=tmp_path))


@pytest.mark.parametrize("verify", [True, False])
def test_rows_are_read_by_number(many_parts, verify):
    recipe, dataset = Recipe(**MANY_PARTS), many_parts(verify)
    for rows in (np.random.default_rng(0).permutation(38), np.array([37, 0, 37, 19]), np.arange(0)):
        ids = recipe.image_ids.repeat(2)[rows]
        codes, labels = dataset.codes(rows), dataset.labels(rows)
        np.testing.assert_array_equal(codes, recipe.codes.reshape(38, 6)[rows])
        np.testing.assert_array_equal(labels, ids % 3)
        for name in dataset.conditions:
            np.testing.assert_array_equal(dataset.condition(name, rows), recipe.condition(name)[rows])
        np.testing.assert_array_equal(dataset.image_ids(rows), ids)
        np.testing.assert_array_equal(dataset.views(rows), rows % 2)
        assert (codes.dtype, codes.shape, labels.dtype) == (np.uint16, (len(rows), 6), np.int64)


def test_rows_describe_their_image_and_crop(many_parts):
    rows = np.array([37, 4, 5, 37])
    table = many_parts().describe(rows)
    assert table.column_names == list(DESCRIBED)
    crops = [{name: row[name] for name in CROP_COLUMNS} for row in table.to_pylist()]
    box = {"crop_left": 1.5, "crop_top": 2.0, "crop_width": 30.0, "crop_height": 40.0}
    assert crops == [{**box, "is_flipped": flipped} for flipped in (True, False, True, True)]
    assert many_parts().describe(rows[:0]).num_rows == 0


def test_the_dataset_describes_itself(tmp_path):
    dataset = CodeDataset.open(Recipe(row_group_rows=4).write(tmp_path), verify=True)
    assert (dataset.num_rows, dataset.num_images, dataset.num_views, dataset.num_codes) == (38, 19, 2, 6)
    assert (dataset.grid, dataset.codebook_size, dataset.bytes_per_row) == ((2, 3), 20, 4)
    assert (dataset.row_group_rows, dataset.images_per_group, dataset.is_remote) == (4, 2, False)
    assert (dataset.class_names, dataset.conditions) == (("class 0", "class 1", "class 2"), ())
    assert dataset.tokenizer_fingerprint == "f" * 64
    assert dataset.manifest["counts"]["n_quarantined"] == {"empty": 1}


def test_row_groups_are_as_large_as_their_rows_allow(tmp_path):
    assert CodeDataset.open(Recipe().write(tmp_path), verify=True).row_group_rows == 16_384


def test_without_classes_labels_are_minus_one(tmp_path):
    dataset = CodeDataset.open(Recipe(num_classes=0).write(tmp_path), verify=True)
    assert dataset.class_names == ()
    np.testing.assert_array_equal(dataset.labels(np.arange(4)), [-1] * 4)


@pytest.mark.parametrize("row", [-1, 38])
@pytest.mark.parametrize("read", ["codes", "labels", "image_ids", "describe"])
def test_a_row_outside_is_refused(tmp_path, row, read):
    dataset = CodeDataset.open(Recipe().write(tmp_path), verify=False)
    with pytest.raises(IndexError, match="38"):
        getattr(dataset, read)(np.array([0, row]))


@pytest.mark.parametrize("kind", ["plans", "receipts", "quarantine", "data", "duplicates"])
def test_flipped_bits_are_found_on_opening(tmp_path, kind):
    root = Recipe(duplicate_of=((9, 2),)).write(tmp_path)
    path = files_of(root, kind)[0]
    for position in np.random.default_rng(0).integers(0, storage.size(path) * 8, 20).tolist():
        flip_bit(path, position)
        with pytest.raises(ArtefactError, match=f"{path} is damaged"):
            CodeDataset.open(root, verify=True)
        flip_bit(path, position)
    CodeDataset.open(root, verify=True)


def addressed_bits(dataset, column):
    """(path, first bit, number of bits) of every row group of a column."""
    for part in dataset.manifest["parts"]:
        for group in part["row_groups"]:
            entry = group["columns"][column]
            yield storage.join(dataset.path, part["path"]), 8 * entry["offset"], 8 * entry["bytes"]


def read_depth(dataset, rows):
    return dataset.condition("depth", rows)


@pytest.mark.parametrize("column", ["codes", "label", "depth"])
def test_flipped_bits_are_found_on_reading(many_parts, column):
    readers = {"codes": CodeDataset.codes, "label": CodeDataset.labels, "depth": read_depth}
    rows = np.arange(38)
    for group, (path, first, count) in list(enumerate(addressed_bits(many_parts(), column)))[::4]:
        flip_bit(path, first + count // 3)
        readers[column](many_parts(), rows[rows // 4 != group])
        with pytest.raises(ArtefactError, match=f"{path} is damaged"):
            readers[column](many_parts(), rows)
        flip_bit(path, first + count // 3)


def test_damage_is_found_beside_the_caller(tmp_path):
    root = Recipe(row_group_rows=4).write(tmp_path)
    dataset = CodeDataset.open(root, verify=False)
    path, first, _ = list(addressed_bits(dataset, "codes"))[3]
    flip_bit(path, first + 9)
    np.testing.assert_array_equal(dataset.codes(np.arange(4), wait=False), Recipe().codes.reshape(-1, 6)[:4])
    dataset.settle()
    dataset.codes(np.array([12]), wait=False)
    for _ in range(2):
        with pytest.raises(ArtefactError, match=f"{path} is damaged"):
            dataset.settle()
    for wait in (False, True):
        with pytest.raises(ArtefactError, match=f"{path} is damaged"):
            dataset.codes(np.array([0]), wait=wait)


def test_damage_of_describing_columns_is_found(many_parts):
    dataset = many_parts()
    path, first, _ = list(addressed_bits(dataset, "image_id"))[2]
    flip_bit(path, first + 8 * 40)
    with pytest.raises(ArtefactError, match=f"{path} is missing or damaged"):
        dataset.describe(np.arange(38))


def test_a_missing_part_is_named(many_parts, place):
    path = files_of(place, "data")[-1]
    storage.delete(path)
    with pytest.raises(ArtefactError, match=f"{path} is missing"):
        many_parts(verify=True)
    with pytest.raises(ArtefactError, match=f"{path} is missing"):
        many_parts().codes(np.array([37]))


def test_a_truncated_part_is_found_without_hashing(tmp_path):
    root = Recipe().write(tmp_path)
    (path,) = files_of(root, "data")
    data = storage.read_bytes(path)
    storage.replace(path, data[:-10])
    with pytest.raises(ArtefactError, match=f"has {len(data) - 10} bytes, but the manifest says {len(data)}"):
        CodeDataset.open(root, verify=False)


def test_of_a_dataset_on_s3_only_what_is_asked_for_is_fetched(s3, tmp_path, monkeypatch):
    fetched, read_range = [], storage.read_range
    monkeypatch.setattr(storage, "read_range", lambda *range: (fetched.append(range), read_range(*range))[1])
    root = Recipe(**MANY_PARTS).write(s3)
    dataset = CodeDataset.open(root, verify=False, cache_folder=str(tmp_path / "cache"))
    assert dataset.is_remote and fetched == []
    dataset.codes(np.array([5, 6, 7, 30]))
    groups = dataset.manifest["parts"][0]["row_groups"]
    columns = [groups[group]["columns"]["codes"] for group in (1, 7)]
    assert sorted(range[1:] for range in fetched) == [(column["offset"], column["bytes"]) for column in columns]
    again = CodeDataset.open(root, verify=False, cache_folder=str(tmp_path / "cache"))
    np.testing.assert_array_equal(again.codes(np.array([30])), Recipe(**MANY_PARTS).codes.reshape(-1, 6)[[30]])
    dataset.prefetch(np.array([4, 29]))
    assert len(fetched) == 2, "these row groups are in the cache"
    dataset.prefetch(np.array([0]))
    np.testing.assert_array_equal(dataset.codes(np.array([0])), Recipe(**MANY_PARTS).codes.reshape(-1, 6)[[0]])
    assert len(fetched) == 3


def test_a_store_that_cannot_be_reached_is_no_damage(s3, tmp_path, monkeypatch):
    dataset = CodeDataset.open(Recipe().write(s3), verify=False, cache_folder=str(tmp_path / "cache"))
    break_store(monkeypatch, "no server")
    for read in (dataset.describe, dataset.codes):
        with pytest.raises(StorageError, match="cannot be reached"):
            read(np.array([5]))


def test_rows_stay_right_when_the_cache_is_too_small(s3, tmp_path):
    root, folder = Recipe(**MANY_PARTS).write(s3), tmp_path / "cache"
    dataset = CodeDataset.open(root, verify=False, cache_folder=str(folder), cache_bytes=100)
    for rows in np.random.default_rng(0).permutation(38).reshape(19, 2):
        np.testing.assert_array_equal(dataset.codes(rows), Recipe(**MANY_PARTS).codes.reshape(-1, 6)[rows])
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert 0 < sum(path.stat().st_size for path in files) <= 100


def test_plain_pyarrow_sees_the_rows_in_the_same_order(many_parts, tmp_path):
    dataset = many_parts()
    tables = [pq.read_table(storage.local_copy(path)) for path in files_of(dataset.path, "data")]
    ids = np.concatenate([table["image_id"].to_numpy() for table in tables])
    np.testing.assert_array_equal(ids, dataset.image_ids(np.arange(38)))
