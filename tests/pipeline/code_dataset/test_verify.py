import numpy as np
import pytest
from code_dataset_support import Recipe

from pipeline import storage
from pipeline.code_dataset.verify import verify_code_dataset

KINDS = ["versions", "manifests", "plans", "receipts", "data", "quarantine"]


@pytest.mark.parametrize("place", ["local", "s3"])
def test_a_sound_dataset_has_no_problems(place, request, tmp_path):
    root = tmp_path if place == "local" else request.getfixturevalue("s3")
    assert verify_code_dataset(Recipe().write(root)) == []


def test_a_dataset_without_classes_or_bad_images_is_sound(tmp_path):
    assert verify_code_dataset(Recipe(num_classes=0, bad_images=(), num_views=1).write(tmp_path)) == []


def test_a_missing_dataset_is_a_problem(tmp_path):
    (problem,) = verify_code_dataset(str(tmp_path))
    assert "must be a published code dataset" in problem


@pytest.mark.parametrize("kind", KINDS)
def test_every_flipped_bit_is_found(tmp_path, kind):
    root = Recipe().write(tmp_path)
    path = storage.list_files(storage.join(root, kind))[0]
    data = storage.read_bytes(path)
    for position in np.random.default_rng(1).integers(0, len(data) * 8, 60):
        damaged = bytearray(data)
        damaged[position // 8] ^= 1 << (position % 8)
        storage.replace(path, bytes(damaged))
        problems = verify_code_dataset(root)
        assert problems and (root in problems[0])
    storage.replace(path, data)
    assert verify_code_dataset(root) == []


@pytest.mark.parametrize("kind", KINDS)
def test_every_missing_file_is_found(tmp_path, kind):
    root = Recipe().write(tmp_path)
    storage.delete(storage.list_files(storage.join(root, kind))[-1])
    assert len(verify_code_dataset(root)) == 1


def test_all_problems_are_listed(tmp_path):
    root = Recipe().write(tmp_path)
    paths = [storage.list_files(storage.join(root, kind))[0] for kind in ("plans", "receipts", "data", "quarantine")]
    for path in paths:
        storage.replace(path, b"")
    problems = verify_code_dataset(root)
    assert len(problems) == len(paths)
    assert all(any(path in problem for problem in problems) for path in paths)
