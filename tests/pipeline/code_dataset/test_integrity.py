import pytest
from code_dataset_support import Recipe, files_of, flip_bit

from pipeline import storage
from pipeline.code_dataset.integrity import expected_files, file_problems, size_problems
from pipeline.code_dataset.layout import canonical_json, probe_path, sha256_hex
from pipeline.code_dataset.manifest import read_manifest


@pytest.fixture
def root(tmp_path):
    return Recipe(duplicate_of=((9, 2),)).write(tmp_path)


def test_every_file_but_the_shards_is_accounted_for(root):
    """The version and the manifest have hashes of their own."""
    expected = {path for path, _ in expected_files(root, read_manifest(root))}
    others = {path for kind in ("versions", "manifests", "shards") for path in files_of(root, kind)}
    assert len(others) == 5 and expected == set(storage.list_files(root)) - others


def test_a_probe_is_one_of_the_files(root):
    path, data = probe_path(root, read_manifest(root)["plan_fp"]), canonical_json({"codes": []})
    manifest = read_manifest(root) | {"probe": {"file_sha256": sha256_hex(data)}}
    assert list(file_problems(root, manifest)) == [f"{path} is missing, but the manifest lists it"]
    storage.replace(path, data)
    assert list(file_problems(root, manifest)) == []
    flip_bit(path, 3)
    (problem,) = file_problems(root, manifest)
    assert problem.startswith(f"{path} is damaged")


def test_a_problem_names_file_expectation_and_finding(root):
    (path,) = files_of(root, "data")
    expected = sha256_hex(storage.read_bytes(path))
    flip_bit(path, 1000)
    (problem,) = file_problems(root, read_manifest(root))
    assert path in problem and expected in problem and sha256_hex(storage.read_bytes(path)) in problem


def test_sizes_are_looked_at_without_reading(root, monkeypatch):
    manifest = read_manifest(root)
    (path,) = files_of(root, "data")
    monkeypatch.setattr(storage, "read_bytes", None)
    assert list(size_problems(root, manifest)) == []
    assert list(size_problems("s3://bucket/codes", manifest)) == [], "opening is no request per part"
    storage.delete(path)
    assert list(size_problems(root, manifest)) == [f"{path} is missing, but the manifest lists it"]
