import pytest
from code_dataset_support import Recipe

from pipeline import storage
from pipeline.code_dataset.publish import counts_add_up, publish, total_counts
from pipeline.code_dataset.reader import read_manifest
from pipeline.code_dataset.receipts import read_receipts
from stages.errors import ArtefactError


def test_counts_must_add_up():
    receipts = [
        {"counts": {"n_input": 8, "n_images": 6, "n_quarantined": {"empty": 1, "truncated": 1}}},
        {"counts": {"n_input": 8, "n_images": 7, "n_quarantined": {"empty": 1}}},
    ]
    counts = total_counts(receipts, num_views=2)
    assert counts["n_quarantined"] == {"empty": 2, "truncated": 1}
    parts = [{"rows": 12}, {"rows": 14}]
    assert counts_add_up(counts, 2, parts)
    assert not counts_add_up(counts, 2, parts[:1])
    assert not counts_add_up(counts, 1, parts)
    assert not counts_add_up({**counts, "n_input": 17}, 2, parts)


def test_publishing_twice_changes_nothing(tmp_path):
    root = Recipe().write(tmp_path)
    files = {path: storage.read_bytes(path) for path in storage.list_files(root)}
    plan = Recipe().plan
    publish(root, read_receipts(root, plan.fingerprint, plan.num_shards), Recipe().description)
    assert {path: storage.read_bytes(path) for path in storage.list_files(root)} == files


def test_row_starts_follow_each_other(tmp_path):
    parts = read_manifest(Recipe(bad_images=tuple(range(8, 16))).write(tmp_path))["parts"]
    assert [(part["row_start"], part["rows"]) for part in parts] == [(0, 16), (16, 8)]


@pytest.mark.parametrize("damage", [storage.delete, lambda path: storage.replace(path, bytes(storage.size(path)))])
def test_a_part_that_was_damaged_before_publishing_is_not_published(tmp_path, damage):
    root, plan = str(tmp_path / "b"), Recipe().plan
    Recipe().write(tmp_path / "a")
    for shard in range(plan.num_shards):
        Recipe().write_shard(root, shard)
    storage.put_file_if_absent(
        storage.join(root, "plans", plan.fingerprint, "plan.parquet"),
        str(tmp_path / "a" / "plans" / plan.fingerprint / "plan.parquet"),
    )
    path = storage.list_files(storage.join(root, "data"))[1]
    damage(path)
    with pytest.raises(ArtefactError, match=path):
        publish(root, read_receipts(root, plan.fingerprint, plan.num_shards), Recipe().description)
    assert storage.list_files(storage.join(root, "versions")) == []
