import re

import numpy as np
import pytest
from code_dataset_support import Recipe, files_of, flip_bit, replace_manifest

from pipeline import storage
from pipeline.code_dataset import compact
from pipeline.code_dataset.garbage import collect_garbage
from pipeline.code_dataset.layout import claim_path
from pipeline.code_dataset.manifest import read_manifest, root_hash
from pipeline.code_dataset.verify import verify_code_dataset

KINDS = ["versions", "manifests", "plans", "receipts", "data", "quarantine", "duplicates"]
RECIPE = Recipe(conditions=("depth",), duplicate_of=((9, 2),), row_group_rows=4)


@pytest.mark.parametrize("place", ["local", "s3"])
def test_a_sound_dataset_has_no_problems(place, request, tmp_path):
    root = RECIPE.write(tmp_path if place == "local" else request.getfixturevalue("s3"))
    assert verify_code_dataset(root) == []


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(num_classes=0, bad_images=(), num_views=1),
        Recipe(drop_duplicates=True, duplicate_of=((9, 2),)),
        Recipe(remap_unused=True, used_codes=(3, 9)),
        Recipe(bad_images=tuple(range(8, 16))),
    ],
)
def test_datasets_of_other_kinds_are_sound(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(compact, "MAX_PART_BYTES", 600)
    root = recipe.write(tmp_path)
    assert verify_code_dataset(root) == []
    assert collect_garbage(root) and verify_code_dataset(root) == []


def test_a_missing_dataset_is_a_problem(tmp_path):
    (problem,) = verify_code_dataset(str(tmp_path))
    assert "must be a published code dataset" in problem


@pytest.mark.parametrize("kind", KINDS)
def test_every_flipped_bit_is_found(tmp_path, kind):
    root = RECIPE.write(tmp_path)
    path = files_of(root, kind)[0]
    for position in np.random.default_rng(1).integers(0, storage.size(path) * 8, 30).tolist():
        flip_bit(path, position)
        problems = verify_code_dataset(root)
        assert problems and root in problems[0]
        flip_bit(path, position)
    assert verify_code_dataset(root) == []


@pytest.mark.parametrize("kind", KINDS)
def test_every_missing_file_is_found(tmp_path, kind):
    root = RECIPE.write(tmp_path)
    storage.delete([path for path in files_of(root, kind) if path != claim_path(root)][-1])  # earlier versions wrote no claim
    assert len(verify_code_dataset(root)) == 1


def test_all_problems_are_listed(tmp_path):
    root = RECIPE.write(tmp_path)
    paths = [files_of(root, kind)[0] for kind in KINDS[2:]]
    for path in paths:
        storage.replace(path, b"")
    problems = verify_code_dataset(root)
    assert len(problems) == len(paths)
    assert all(any(path in problem for problem in problems) for path in paths)


def wrong_hash(manifest):
    manifest["parts"][0]["row_groups"][1]["columns"]["depth"]["xxh3_64"] = "0" * 16


def wrong_offset(manifest):
    manifest["parts"][0]["row_groups"][1]["columns"]["codes"]["offset"] += 4


def wrong_kind(manifest):
    manifest["counts"]["n_quarantined"] = {"truncated": 1}


def wrong_duplicates(manifest):
    manifest["counts"]["n_duplicates"] = 2


def wrong_views(manifest):
    """Two images with one view each where there was one with two."""
    manifest["views"] = manifest["views"][:1]
    manifest["counts"] |= {"n_images": 38, "n_input": 39}


def wrong_codebook(manifest):
    manifest["codec"] |= {"codebook_size": 17}  # as many bits as 20 need


def wrong_number_of_rows(manifest):
    part = manifest["parts"][0]
    part["rows"] -= part["row_groups"].pop()["rows"]
    manifest["counts"] |= {"n_images": 18, "n_rows": 36, "n_input": 19}


def wrong_row_start(manifest):
    manifest["parts"][0]["row_start"] = 4


def wrong_row_group_size(manifest):
    manifest["codec"]["row_group_rows"] = 8


@pytest.mark.parametrize(
    "change, message",
    [
        (wrong_hash, "has xxh3_64 .* in column depth"),
        (wrong_offset, "has xxh3_64 .* in column codes"),
        (wrong_kind, "has quarantined"),
        (wrong_duplicates, "lists 1 duplicates, but its manifest counts 2"),
        (wrong_views, "plan of 20 images in 3 shards, but its manifest says 39"),
        (wrong_codebook, "holds code 19, but the codebook has 17"),
        (wrong_number_of_rows, "plan of 19 usable images, but its manifest counts 18"),
        (wrong_row_start, "must hold rows 0 to 38 in full row groups of 4"),
        (wrong_row_group_size, "must hold rows 0 to 38 in full row groups of 8"),
    ],
)
def test_a_manifest_that_says_otherwise_is_found_though_every_hash_is_right(tmp_path, change, message):
    root = RECIPE.write(tmp_path)
    manifest = read_manifest(root)
    change(manifest)
    replace_manifest(root, manifest)
    assert re.search(f"{root}.*{message}", "\n".join(verify_code_dataset(root)))


def test_rows_of_other_images_than_the_plans_are_found(tmp_path):
    """Two datasets differ in which image is bad; one gets the rows of the other."""
    root, other = (Recipe(bad_images=(bad,)).write(tmp_path / str(bad)) for bad in (5, 6))
    parts = read_manifest(other)["parts"]
    for part in parts:
        storage.put_file_if_absent(storage.join(root, part["path"]), storage.join(other, part["path"]))
    replace_manifest(root, read_manifest(root) | {"parts": parts, "root_hash": root_hash(parts)})
    problems = verify_code_dataset(root)
    assert [problem.split(" has another ")[1] for problem in problems] == [
        "image_id in row 10 than the plan",
        "label in row 10 than the plan",
    ]
