import numpy as np
import pyarrow.parquet as pq
import pytest
from code_dataset_support import Recipe, files_of

from pipeline import storage
from pipeline.code_dataset.receipts import finished_shards, put_content, read_receipts
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
    for entry, kind in ((receipt["part"], "shards"), (receipt["quarantine"], "quarantine")):
        path = storage.join(root, entry["path"])
        assert files_of(root, kind) == [path]
        assert storage.size(path) == entry["bytes"]


def test_a_shard_knows_the_bytes_that_its_rows_were_made_of(tmp_path):
    receipt = Recipe(duplicate_of=((3, 1),)).write_shard(str(tmp_path), 0)
    digests = pq.read_table(tmp_path / receipt["part"]["path"])["source_sha256"].to_pylist()
    assert digests[::2] == digests[1::2], "both views of an image are made of the same bytes"
    assert digests[2] == digests[6] and len(set(digests)) == 6


def test_a_shard_of_bad_images_has_no_part(root):
    receipt = Recipe(bad_images=tuple(range(8))).write_shard(root, 0)
    assert receipt["part"] is None
    assert receipt["counts"]["n_images"] == 0
    assert files_of(root, "shards") == []


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
    (path,) = files_of(root, "receipts")
    storage.replace(path, text)
    with pytest.raises(ArtefactError, match="00000.json is"):
        read_receipts(root, Recipe().plan.fingerprint, 1)


def test_content_is_stored_once_under_a_name_of_its_own(root):
    first, again, other = (put_content(root, "data", "plan", 3, data) for data in (b"one", b"one", b"two"))
    assert first == again and first["path"] != other["path"]
    assert first["path"].startswith("data/plan/part-00003-") and first["sha256"].startswith(first["path"][-24:-8])
    assert [storage.read_bytes(path) for path in sorted(files_of(root, "data"))] == [
        data for _, data in sorted([(first["path"], b"one"), (other["path"], b"two")])
    ]
