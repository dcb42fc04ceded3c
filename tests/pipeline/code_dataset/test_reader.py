import json

import numpy as np
import pytest
from code_dataset_support import Recipe

from pipeline import storage
from pipeline.code_dataset import CodeDataset, parts
from pipeline.code_dataset.layout import canonical_json, sha256_hex
from pipeline.code_dataset.reader import read_manifest
from stages.errors import ArtefactError


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("place", ["local", "s3"])
def test_rows_are_read_by_number(place, verify, request, tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "ROW_GROUP_ROWS", 6)  # several row groups per part
    root = Recipe().write(tmp_path if place == "local" else request.getfixturevalue("s3"))
    dataset = CodeDataset.open(root, verify=verify)
    rows = np.random.default_rng(0).permutation(38)
    np.testing.assert_array_equal(dataset.codes(rows), Recipe().codes.reshape(38, 6)[rows])
    ids = Recipe().image_ids.repeat(2)[rows]
    np.testing.assert_array_equal(dataset.image_ids(rows), ids)
    np.testing.assert_array_equal(dataset.labels(rows), ids % 3)
    np.testing.assert_array_equal(dataset.views(rows), rows % 2)
    for values in (dataset.codes(rows), dataset.labels(rows), dataset.image_ids(rows), dataset.views(rows)):
        assert values.dtype == np.int64
    assert dataset.codes(rows[:0]).shape == (0, 6)


def test_the_dataset_describes_itself(tmp_path):
    dataset = CodeDataset.open(Recipe().write(tmp_path), verify=True)
    assert (dataset.num_rows, dataset.num_images, dataset.num_views, dataset.num_codes) == (38, 19, 2, 6)
    assert (dataset.grid, dataset.codebook_size, dataset.bytes_per_row) == ((2, 3), 20, 4)
    assert dataset.class_names == ("class 0", "class 1", "class 2")
    assert dataset.tokenizer_fingerprint == "f" * 64
    assert dataset.manifest["counts"]["n_quarantined"] == {"empty": 1}


def test_without_classes_labels_are_minus_one(tmp_path):
    dataset = CodeDataset.open(Recipe(num_classes=0).write(tmp_path), verify=True)
    assert dataset.class_names == ()
    np.testing.assert_array_equal(dataset.labels(np.arange(4)), [-1] * 4)


def test_the_statistics_are_those_of_the_codes(tmp_path):
    stats = read_manifest(Recipe().write(tmp_path))["stats"]
    counts = np.bincount(Recipe().codes.ravel())
    shares = counts[counts > 0] / counts.sum()
    assert stats["used_codes"] == len(shares)
    assert stats["entropy_bits_per_code"] == pytest.approx(-(shares * np.log2(shares)).sum())


def test_the_root_hash_depends_on_the_rows_only(tmp_path):
    first, second = Recipe().write(tmp_path / "a"), str(tmp_path / "b")
    Recipe().write_shard(second, 1)
    Recipe().write(second)
    assert CodeDataset.open(first, verify=True).root_hash == CodeDataset.open(second, verify=True).root_hash
    other = CodeDataset.open(Recipe(bad_images=()).write(tmp_path / "c"), verify=True)
    assert other.root_hash != CodeDataset.open(first, verify=True).root_hash


@pytest.mark.parametrize("row", [-1, 38])
def test_a_row_outside_is_refused(tmp_path, row):
    with pytest.raises(IndexError, match="38"):
        CodeDataset.open(Recipe().write(tmp_path), verify=False).codes(np.array([0, row]))


def test_a_missing_dataset_is_refused(tmp_path):
    with pytest.raises(ArtefactError, match="there is none"):
        CodeDataset.open(str(tmp_path / "nothing"), verify=False)


def test_a_half_written_dataset_is_refused(tmp_path):
    Recipe().write_shard(str(tmp_path), 0)
    with pytest.raises(ArtefactError, match="an unfinished one"):
        CodeDataset.open(str(tmp_path), verify=False)


@pytest.mark.parametrize("kind", ["versions", "manifests", "data"])
def test_flipped_bits_are_found(tmp_path, kind):
    root = Recipe().write(tmp_path)
    path = storage.list_files(storage.join(root, kind))[0]
    data = storage.read_bytes(path)
    for position in np.random.default_rng(0).integers(0, len(data) * 8, 100):
        damaged = bytearray(data)
        damaged[position // 8] ^= 1 << (position % 8)
        storage.replace(path, bytes(damaged))
        with pytest.raises(ArtefactError) as error:
            CodeDataset.open(root, verify=True)
        assert root in str(error.value)
    storage.replace(path, data)
    CodeDataset.open(root, verify=True)


@pytest.mark.parametrize("kind", ["manifests", "data"])
def test_missing_files_are_named(tmp_path, kind):
    root = Recipe().write(tmp_path)
    path = storage.list_files(storage.join(root, kind))[-1]
    storage.delete(path)
    with pytest.raises(ArtefactError, match=f"{path} is missing"):
        CodeDataset.open(root, verify=False)


def test_a_truncated_part_is_found_without_hashing(tmp_path):
    root = Recipe().write(tmp_path)
    path = storage.list_files(storage.join(root, "data"))[0]
    data = storage.read_bytes(path)
    storage.replace(path, data[:-10])
    with pytest.raises(ArtefactError, match=f"has {len(data) - 10} bytes, but the manifest says {len(data)}"):
        CodeDataset.open(root, verify=False)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"format_version": 2}, "knows tessera-code-dataset 1"),
        ({"views": ["one"]}, "must add up"),
        ({"root_hash": "0" * 64}, "root hash"),
        ({"codec": {"bits": 4, "bytes_per_row": 4, "codebook_size": 20}}, "needs 5"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(tmp_path, change, message):
    """Also when every hash was made to fit, as another writer's mistake would be."""
    root = Recipe().write(tmp_path)
    manifest = {**read_manifest(root), **change}
    data = canonical_json(manifest)
    storage.replace(storage.join(root, "manifests", f"{sha256_hex(data)}.json"), data)
    (path,) = storage.list_files(storage.join(root, "versions"))
    version = {**json.loads(storage.read_bytes(path)), "manifest_sha256": sha256_hex(data)}
    del version["sha256"]
    storage.replace(path, canonical_json({**version, "sha256": sha256_hex(canonical_json(version))}))
    with pytest.raises(ArtefactError, match=message):
        CodeDataset.open(root, verify=False)
