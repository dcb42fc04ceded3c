import os
import time

import numpy as np
import pytest
from code_dataset_support import Recipe, files_of

from pipeline import storage
from pipeline.code_dataset import CodeDataset
from pipeline.code_dataset.garbage import collect_garbage
from pipeline.code_dataset.layout import CONTENT_KINDS, content_path, manifest_path, receipt_path, receipts_path
from pipeline.code_dataset.plan import freeze
from pipeline.code_dataset.verify import verify_code_dataset


@pytest.fixture(params=["local", "s3"])
def root(request, tmp_path):
    return str(tmp_path) if request.param == "local" else request.getfixturevalue("s3")


OTHER = "0123456789abcdef" * 4  # a sha-256 of nothing that is there


def strays(root):
    """One file of a dead attempt per folder."""
    paths = [storage.join(root, content_path(kind, Recipe().plan.fingerprint, 12, OTHER)) for kind in CONTENT_KINDS]
    paths.append(manifest_path(root, OTHER))
    for path in paths:
        storage.put_if_absent(path, b"stray")
    return paths


def files_of_the_user(root):
    """What someone keeps in the same folder, under names that are nearly those of the format."""
    of_plan = Recipe().plan.fingerprint
    names = [
        "data/cat/1.jpg",
        "data/part-00000-0123456789abcdef.parquet",
        f"data/{of_plan}/part-00000.parquet",
        f"shards/{of_plan}/part-00000-{OTHER[:16]}.parquet.bak",
        f"shards/{of_plan}/part-00000-notes.txt",
        "quarantine/broken.png",
        f"duplicates/old/data/{OTHER}/part-00000-{OTHER[:16]}.parquet",
        "manifests/list.json",
        "receipts/shop/1.json",
        "receipts/1.json",
    ]
    paths = [storage.join(root, name) for name in names]
    for path in paths:
        storage.put_if_absent(path, b"{}?")
    return paths


def half_written(root):
    freeze(root, Recipe().plan)
    for shard in (0, 2):
        Recipe().write_shard(root, shard)


def test_of_a_published_dataset_everything_else_goes(root):
    Recipe(duplicate_of=((9, 2),)).write(root)
    shards, kept = files_of(root, "shards"), set(storage.list_files(root))
    assert len(shards) == 3
    garbage = {*shards, *strays(root)}
    assert set(collect_garbage(root)) == garbage
    assert set(storage.list_files(root)) == kept - garbage
    assert verify_code_dataset(root) == []
    rows = np.arange(38)
    np.testing.assert_array_equal(CodeDataset.open(root, verify=True).codes(rows), Recipe().codes.reshape(38, 6))
    assert collect_garbage(root) == []


def test_what_a_job_may_still_be_writing_stays(root):
    half_written(root)
    strays(root)
    before = storage.list_files(root)
    assert collect_garbage(root) == []
    assert storage.list_files(root) == before


@pytest.mark.parametrize("is_published", [True, False])
def test_files_that_the_format_does_not_name_so_stay(root, is_published):
    (Recipe().write if is_published else half_written)(root)
    collect_garbage(root)
    mine = files_of_the_user(root)
    assert collect_garbage(root) == []
    assert set(mine) <= set(storage.list_files(root))


def test_images_beside_a_dataset_in_their_folder_stay(tmp_path):
    """As with source.path=/mnt/set/data and codes.path=/mnt/set."""
    images = [tmp_path / "data" / name for name in ("a.png", f"{storage.TEMPORARY}a.png")]
    for image in images:
        storage.put_if_absent(str(image), b"pixels")
        os.utime(image, (0, 0))
    Recipe().write(tmp_path)
    collect_garbage(str(tmp_path))
    assert all(image.exists() for image in images)


def test_of_a_shard_with_a_receipt_what_other_attempts_wrote_goes(root):
    half_written(root)
    before = storage.list_files(root)
    Recipe(bad_images=(4, 5)).write_shard(root, 0)
    garbage = set(storage.list_files(root)) - set(before)
    assert {path[len(root) + 1 :].split("/")[0] for path in garbage} == {"shards", "quarantine"}
    assert set(collect_garbage(root)) == garbage
    assert storage.list_files(root) == before
    Recipe().write(root)
    assert verify_code_dataset(root) == []


def test_what_a_dead_attempt_wrote_is_there_when_its_shard_gets_the_receipt(tmp_path, monkeypatch):
    """However old it is: it has the name of what the next attempt writes, which leaves it as it is."""
    root = str(tmp_path)
    half_written(root)
    dead = files_of(root, "shards")[1]
    os.utime(dead, (0, 0))
    put, is_collected = storage.put_if_absent, []

    def put_after_collecting(path, data):
        if "/receipts/" in path:
            is_collected.append(collect_garbage(root))
        return put(path, data)

    os.remove(receipt_path(root, Recipe().plan.fingerprint, 2))
    monkeypatch.setattr(storage, "put_if_absent", put_after_collecting)
    Recipe().write(root)
    assert is_collected == [[], []] and verify_code_dataset(root) == []


@pytest.mark.parametrize("is_published", [True, False])
def test_temporary_files_go_when_they_are_old(tmp_path, is_published):
    root = str(tmp_path)
    (Recipe().write if is_published else half_written)(root)
    collect_garbage(root)
    old, new = (os.path.join(receipts_path(root, Recipe().plan.fingerprint), f"{storage.TEMPORARY}{digit * 32}") for digit in "01")
    for path in (old, new):
        with open(path, "wb") as file:
            file.write(b"half")
    os.utime(old, (time.time() - 7200,) * 2)
    assert collect_garbage(root) == [old]
    assert os.path.exists(new)


@pytest.mark.parametrize("place", ["config.yaml", "versions/1", "manifests/1", "plans/1", *(f"{kind}/PLAN/1" for kind in CONTENT_KINDS)])
def test_what_a_killed_process_left_half_written_goes(tmp_path, place, monkeypatch):
    root = Recipe().write(tmp_path)
    collect_garbage(root)
    left = []
    monkeypatch.setattr(os, "link", lambda temporary, path: left.append(temporary))
    monkeypatch.setattr(os, "unlink", lambda path: None)
    storage.put_if_absent(storage.join(root, place.replace("PLAN", Recipe().plan.fingerprint)), b"half")
    monkeypatch.undo()
    assert len(left) == 1 and collect_garbage(root, grace_seconds=-60.0) == left


def test_the_plan_receipts_and_configuration_are_never_garbage(tmp_path):
    root = Recipe().write(tmp_path)
    storage.put_if_absent(storage.join(root, "config.yaml"), b"codes: {}")
    kept = ["config.yaml", "manifests", "plans", "receipts", "versions", "data", "quarantine"]
    collect_garbage(root, grace_seconds=-60.0)
    assert sorted({path[len(root) + 1 :].split("/")[0] for path in storage.list_files(root)}) == sorted(kept)


def test_nothing_is_garbage_where_there_is_nothing(root):
    assert collect_garbage(root) == []
