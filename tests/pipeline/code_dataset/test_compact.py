from multiprocessing.pool import ThreadPool

import numpy as np
import pytest
from code_dataset_support import Recipe, files_of
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pipeline.code_dataset import CodeDataset, compact
from pipeline.code_dataset.compact import Survey, find_duplicates, part_bounds, survey_shards
from pipeline.code_dataset.manifest import read_manifest
from pipeline.code_dataset.parts import DESCRIBED, RowFormat
from pipeline.code_dataset.plan import freeze
from pipeline.code_dataset.publish import publish
from pipeline.code_dataset.receipts import read_receipts
from pipeline.code_dataset.verify import verify_code_dataset
from stages.errors import ArtefactError

LARGEST, SMALLEST = 98_000_000, 40_000_000


def described_bytes():
    """Of a row's describing columns at most: they are compressed."""
    return sum(-(-kind.bit_width // 8) for kind in DESCRIBED.values())


@pytest.mark.parametrize("options", [{}, {"drop_duplicates": True}, {"remap_unused": True, "used_codes": (1, 7, 11)}])
def test_the_rows_do_not_depend_on_the_size_of_a_shard(tmp_path, options, monkeypatch):
    monkeypatch.setattr(compact, "MAX_PART_BYTES", 600)
    contents = set()
    for shard_size in (1, 3, 7, 8, 20, 100):
        recipe = Recipe(shard_size=shard_size, duplicate_of=((9, 2), (12, 2)), row_group_rows=4, **options)
        dataset = CodeDataset.open(recipe.write(tmp_path / str(shard_size)), verify=True)
        rows = np.arange(dataset.num_rows)
        np.testing.assert_array_equal(dataset.image_ids(rows), recipe.image_ids.repeat(2))
        np.testing.assert_array_equal(dataset.views(rows), rows % 2)
        np.testing.assert_array_equal(dataset.codes(rows), recipe.codes.reshape(-1, 6))
        contents.add(tuple(part["sha256"] for part in dataset.manifest["parts"]))
    assert len(contents) == 1, "the files are the same byte by byte"
    assert len(contents.pop()) > 2


def test_many_parts_of_many_row_groups_follow_each_other(tmp_path, monkeypatch):
    monkeypatch.setattr(compact, "MAX_PART_BYTES", 600)
    root = Recipe(row_group_rows=4).write(tmp_path)
    parts = read_manifest(root)["parts"]
    groups = [group["rows"] for part in parts for group in part["row_groups"]]
    assert groups == [4] * 9 + [2], "only the last row group of all is not full"
    assert len(parts) > 2 and any(len(part["row_groups"]) > 1 for part in parts)
    starts = np.cumsum([0, *(part["rows"] for part in parts)])
    assert [part["row_start"] for part in parts] == starts[:-1].tolist() and starts[-1] == 38
    assert verify_code_dataset(root) == []


def test_a_small_dataset_is_one_part(tmp_path):
    root = Recipe(shard_size=1).write(tmp_path)
    assert len(files_of(root, "data")) == 1 and len(files_of(root, "shards")) == 19


def test_shards_of_bad_images_leave_no_gap(tmp_path):
    recipe = Recipe(bad_images=tuple(range(8, 16)), row_group_rows=4)
    dataset = CodeDataset.open(recipe.write(tmp_path), verify=True)
    np.testing.assert_array_equal(dataset.image_ids(np.arange(24)), recipe.image_ids.repeat(2))
    np.testing.assert_array_equal(dataset.codes(np.arange(24)), recipe.codes.reshape(-1, 6))


def test_work_may_run_anywhere_in_any_order(tmp_path, monkeypatch):
    monkeypatch.setattr(compact, "MAX_PART_BYTES", 600)
    recipe = Recipe(row_group_rows=4)
    expected, root = read_manifest(recipe.write(tmp_path / "a")), str(tmp_path / "b")
    freeze(root, recipe.plan)
    for shard in range(recipe.plan.num_shards):
        recipe.write_shard(root, shard)
    receipts = read_receipts(root, recipe.plan.fingerprint, recipe.plan.num_shards)
    with ThreadPool(3) as pool:
        publish(
            root,
            receipts,
            recipe.description,
            row_group_rows=4,
            run=lambda function, items: pool.map(function, list(items)[::-1])[::-1],
        )
    assert read_manifest(root) == expected


row_formats = st.builds(
    RowFormat,
    num_codes=st.sampled_from([64, 144, 256, 576, 1024]),
    codebook_size=st.sampled_from([512, 1024, 8192, 16_384, 65_536]),
    has_labels=st.booleans(),
    conditions=st.sampled_from([(), ("a",), ("a", "b"), ("a", "b", "c")]),
)


@settings(max_examples=2000)
@given(row_format=row_formats, num_rows=st.integers(1, 20_000_000))
def test_parts_of_realistic_rows_have_a_size_that_storage_likes(row_format, num_rows):
    group_rows, stored = row_format.row_group_rows(), sum(row_format.addressed.values())
    assume(stored >= 80)
    bounds = part_bounds(num_rows, group_rows, stored + described_bytes())
    assert bounds[0] == 0 and bounds[-1] == num_rows and (np.diff(bounds) > 0).all()
    assert not (bounds[:-1] % group_rows).any()
    assert (np.diff(bounds) * (stored + described_bytes())).max() <= LARGEST
    if num_rows * stored >= LARGEST:
        assert (np.diff(bounds) * stored).min() >= SMALLEST


@given(
    num_rows=st.integers(1, 5000),
    group_rows=st.sampled_from([1, 2, 16, 256]),
    row_bytes=st.floats(1, 2e8),
)
def test_parts_are_whole_row_groups_whatever_a_row_weighs(num_rows, group_rows, row_bytes):
    bounds = part_bounds(num_rows, group_rows, row_bytes)
    sizes = np.diff(bounds)
    assert bounds[0] == 0 and bounds[-1] == num_rows and (sizes > 0).all()
    assert not (bounds[:-1] % group_rows).any()
    assert ((sizes * row_bytes <= LARGEST) | (sizes <= group_rows)).all()


def test_the_first_of_equal_images_in_plan_order_is_the_original():
    def survey(ids, contents):
        return Survey(np.array(ids), [content.encode() * 32 for content in contents], np.zeros(1, bool))

    found = find_duplicates([survey([7, 3, 9], "aba"), survey([], ""), survey([1, 2, 4], "bca")])
    pairs = [(row["image_id"], row["first_image_id"], bytes.fromhex(row["sha256"])[:1]) for row in found]
    assert pairs == [(9, 7, b"a"), (1, 3, b"b"), (4, 7, b"a")]


def test_a_survey_knows_images_and_codes_in_use(tmp_path):
    recipe = Recipe(used_codes=(2, 9), num_classes=0)
    shard = recipe.write_shard(str(tmp_path), 0)["part"]
    (survey,) = survey_shards(str(tmp_path), [shard], recipe.row_format, recipe.num_views)
    assert survey.image_ids.tolist() == [100, 101, 102, 103, 104, 106, 107]
    assert np.flatnonzero(survey.is_used).tolist() == [2, 9]
    assert len(set(survey.sha256)) == 7


def test_a_shard_that_is_not_what_its_receipt_says_is_named(tmp_path):
    shard = Recipe().write_shard(str(tmp_path), 0)["part"]
    with pytest.raises(ArtefactError, match=f"{tmp_path}/shards/.* is missing or damaged"):
        compact.read_shard(str(tmp_path), {**shard, "sha256": "0" * 64})
