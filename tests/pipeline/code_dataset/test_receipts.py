import numpy as np
import pytest
from code_dataset_support import Recipe

from pipeline import storage
from pipeline.code_dataset.receipts import finished_shards, read_receipts
from stages.errors import ArtefactError


@pytest.fixture(params=["local", "s3"])
def root(request, tmp_path):
    return str(tmp_path) if request.param == "local" else request.getfixturevalue("s3")


def test_the_first_committer_wins(root):
    first = Recipe().write_shard(root, 0)
    second = Recipe().write_shard(root, 0, codes=np.zeros((7, 2, 6), np.int64))
    assert second == first
    assert read_receipts(root, Recipe().plan.fingerprint, 1) == [first]


def test_a_repeated_commit_writes_no_new_file(root):
    Recipe().write_shard(root, 0)
    files = storage.list_files(root)
    Recipe().write_shard(root, 0)
    assert storage.list_files(root) == files


def test_counts_and_files_of_a_receipt(root):
    receipt = Recipe(bad_images=(5, 6)).write_shard(root, 0)
    assert receipt["counts"] == {"n_input": 8, "n_images": 6, "n_quarantined": {"empty": 2}}
    assert receipt["part"]["rows"] == 12 and receipt["quarantine"]["rows"] == 2
    for entry in (receipt["part"], receipt["quarantine"]):
        assert storage.size(storage.join(root, entry["path"])) == entry["bytes"]


def test_a_shard_of_bad_images_has_no_part(root):
    receipt = Recipe(bad_images=tuple(range(8))).write_shard(root, 0)
    assert receipt["part"] is None
    assert receipt["counts"]["n_images"] == 0


def test_finished_shards_are_those_with_a_receipt(root):
    fingerprint = Recipe().plan.fingerprint
    assert finished_shards(root, fingerprint) == set()
    Recipe().write_shard(root, 2)
    assert finished_shards(root, fingerprint) == {2}
    with pytest.raises(ArtefactError, match="00000.json is missing"):
        read_receipts(root, fingerprint, 3)


@pytest.mark.parametrize("text", [b"{", b"[]", b'{"shard":1,"plan_fp":"x"}'])
def test_a_damaged_receipt_is_named(root, text):
    Recipe().write_shard(root, 0)
    (path,) = storage.list_files(storage.join(root, "receipts"))
    storage.replace(path, text)
    with pytest.raises(ArtefactError, match="00000.json is"):
        read_receipts(root, Recipe().plan.fingerprint, 1)
