import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from code_dataset_support import Recipe, files_of

from pipeline import storage
from pipeline.code_dataset import CodeDataset
from pipeline.code_dataset.garbage import collect_garbage
from pipeline.code_dataset.layout import canonical_json, sha256_hex
from pipeline.code_dataset.manifest import counts_add_up, read_manifest
from pipeline.code_dataset.plan import freeze
from pipeline.code_dataset.publish import publish, statistics, total_counts
from pipeline.code_dataset.receipts import read_receipts
from pipeline.code_dataset.verify import verify_code_dataset
from stages.errors import ArtefactError

DUPLICATES = ((9, 2), (12, 2), (13, 11))  # image 12 and 9 in the second shard, 2 in the first


def receipts_of(root, recipe):
    return read_receipts(root, recipe.plan.fingerprint, recipe.plan.num_shards)


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
    fewer = total_counts(receipts, num_views=2, num_dropped=3)
    assert (fewer["n_input"], fewer["n_images"], fewer["n_rows"], fewer["n_dedup_dropped"]) == (16, 10, 20, 3)
    assert counts_add_up(fewer, 2, [{"rows": 20}])


def test_publishing_twice_changes_nothing(tmp_path):
    recipe = Recipe(duplicate_of=DUPLICATES)
    root = recipe.write(tmp_path)
    files = {path: storage.read_bytes(path) for path in storage.list_files(root)}
    publish(root, receipts_of(root, recipe), recipe.description)
    assert {path: storage.read_bytes(path) for path in storage.list_files(root)} == files


def test_a_version_that_is_there_stays(tmp_path):
    recipe = Recipe()
    root = recipe.write(tmp_path)
    expected = CodeDataset.open(root, verify=True).manifest
    publish(root, receipts_of(root, recipe), recipe.description, row_group_rows=4)
    assert CodeDataset.open(root, verify=True).manifest == expected


def test_another_job_may_publish_first_and_remove_the_shards(tmp_path):
    recipe = Recipe()
    root = recipe.write(tmp_path)
    receipts = receipts_of(root, recipe)
    collect_garbage(root)
    files = {path: storage.read_bytes(path) for path in storage.list_files(root)}
    publish(root, receipts, recipe.description)
    assert {path: storage.read_bytes(path) for path in storage.list_files(root)} == files


@pytest.mark.parametrize("damage", [storage.delete, lambda path: storage.replace(path, bytes(storage.size(path)))])
def test_a_shard_that_was_damaged_is_not_published(tmp_path, damage):
    root, recipe = str(tmp_path), Recipe()
    freeze(root, recipe.plan)
    for shard in range(recipe.plan.num_shards):
        recipe.write_shard(root, shard)
    path = files_of(root, "shards")[1]
    damage(path)
    with pytest.raises(ArtefactError, match=path):
        publish(root, receipts_of(root, recipe), recipe.description)
    assert files_of(root, "versions") == []


@pytest.mark.parametrize("drop_duplicates", [False, True])
def test_duplicates_are_reported_and_dropped_on_demand(tmp_path, drop_duplicates):
    recipe = Recipe(duplicate_of=DUPLICATES, drop_duplicates=drop_duplicates)
    root = recipe.write(tmp_path)
    dataset = CodeDataset.open(root, verify=True)
    counts = dataset.manifest["counts"]
    assert (counts["n_duplicates"], counts["n_dedup_dropped"]) == (3, 3 if drop_duplicates else 0)
    assert counts["n_input"] == 20 == counts["n_images"] + 1 + counts["n_dedup_dropped"]
    (file,) = files_of(root, "duplicates")
    pairs = [(row["image_id"], row["first_image_id"]) for row in pq.read_table(file).to_pylist()]
    assert pairs == [(109, 102), (112, 102), (113, 111)]
    rows = np.arange(dataset.num_rows)
    np.testing.assert_array_equal(dataset.image_ids(rows), recipe.image_ids.repeat(2))
    np.testing.assert_array_equal(dataset.codes(rows), recipe.codes.reshape(-1, 6))
    assert verify_code_dataset(root) == []


def test_without_duplicates_nothing_is_dropped(tmp_path):
    root = Recipe(drop_duplicates=True).write(tmp_path)
    manifest = read_manifest(root)
    assert (manifest["counts"]["n_duplicates"], manifest["duplicates"], files_of(root, "duplicates")) == (0, None, [])


def test_unused_codebook_entries_are_left_out_without_changing_the_codes(tmp_path):
    used = (3, 7, 500, 600, 1023)
    options = {"codebook_size": 1024, "used_codes": used}
    plain = CodeDataset.open(Recipe(**options).write(tmp_path / "plain"), verify=True)
    root = Recipe(**options, remap_unused=True).write(tmp_path / "dense")
    dense = CodeDataset.open(root, verify=True)
    rows = np.random.default_rng(0).permutation(38)
    np.testing.assert_array_equal(dense.codes(rows), plain.codes(rows))
    codec = dense.manifest["codec"]
    assert (plain.manifest["codec"]["bits"], codec["bits"], codec["codebook_size"]) == (10, 3, 1024)
    assert (plain.bytes_per_row, dense.bytes_per_row, dense.codebook_size) == (8, 3, 1024)
    assert codec["remap"] == list(used)
    assert codec["remap_sha256"] == sha256_hex(np.array(used, "<u2").tobytes())
    assert dense.manifest["stats"] == plain.manifest["stats"], "statistics are those of the tokenizer's codes"
    assert "remap" not in plain.manifest["codec"]
    assert verify_code_dataset(root) == []


def test_the_statistics_are_those_of_the_codes(tmp_path):
    stats = read_manifest(Recipe().write(tmp_path))["stats"]
    counts = np.bincount(Recipe().codes.ravel(), minlength=20)
    shares = counts[counts > 0] / counts.sum()
    assert stats["used_codes"] == len(shares)
    assert stats["entropy_bits_per_code"] == pytest.approx(-(shares * np.log2(shares)).sum())
    assert stats == statistics(counts)
    assert stats["code_histogram_sha256"] == sha256_hex(counts.astype("<i8").tobytes())


def test_the_manifest_says_what_the_columns_are(tmp_path):
    manifest = read_manifest(Recipe(conditions=("depth",)).write(tmp_path))
    columns = {column["name"]: column for column in manifest["columns"]}
    roles = {name: column["role"] for name, column in columns.items() if column["role"] != "crop"}
    assert roles == {"image_id": "key", "view": "key", "label": "label", "depth": "condition", "codes": "codes"}
    assert columns["codes"] == {"name": "codes", "role": "codes", "bytes": 4, "bits": 5, "shape": [2, 3]}
    assert columns["depth"] == {"name": "depth", "role": "condition", "bytes": 6, "bits": 8, "shape": [2, 3]}
    assert columns["label"]["bytes"] == 4
    (path,) = files_of(tmp_path, "data")
    assert [column["name"] for column in manifest["columns"]] == pq.read_schema(path).names


def test_the_manifest_says_who_made_the_codes(tmp_path):
    recipe, root = Recipe(), str(tmp_path)
    freeze(root, recipe.plan)
    for shard in range(recipe.plan.num_shards):
        recipe.write_shard(root, shard)
    receipts = [{**receipt, "encoder": {"device": "ab"[i % 2]}} for i, receipt in enumerate(receipts_of(root, recipe))]
    publish(root, receipts, recipe.description)
    manifest = read_manifest(root)
    assert manifest["encoders"] == [{"device": "a", "num_shards": 2}, {"device": "b", "num_shards": 1}]
    assert manifest["receipts_sha256"] == [sha256_hex(canonical_json(receipt)) for receipt in receipts]


def test_a_version_file_carries_its_own_hash(tmp_path):
    (path,) = files_of(Recipe().write(tmp_path), "versions")
    version = json.loads(storage.read_bytes(path))
    digest = version.pop("sha256")
    assert digest == sha256_hex(canonical_json(version))
    assert files_of(tmp_path, "manifests") == [f"{tmp_path}/manifests/{version['manifest_sha256']}.json"]
