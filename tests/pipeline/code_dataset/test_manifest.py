import pytest
from code_dataset_support import Recipe, files_of, flip_bit, replace_manifest

from pipeline import storage
from pipeline.code_dataset import CodeDataset
from pipeline.code_dataset.layout import sha256_hex
from pipeline.code_dataset.manifest import is_published, read_manifest, root_hash, row_format_of
from stages.errors import ArtefactError


@pytest.fixture
def root(tmp_path):
    return Recipe().write(tmp_path)


def test_a_missing_dataset_is_refused(tmp_path):
    assert not is_published(str(tmp_path / "nothing"))
    with pytest.raises(ArtefactError, match="there is none"):
        CodeDataset.open(str(tmp_path / "nothing"), verify=False)


def test_a_half_written_dataset_is_refused(tmp_path):
    Recipe().write_shard(str(tmp_path), 0)
    assert not is_published(str(tmp_path))
    with pytest.raises(ArtefactError, match="an unfinished one"):
        CodeDataset.open(str(tmp_path), verify=False)


@pytest.mark.parametrize(
    "kind, message", [("manifests", "is missing"), ("versions", "must be a published code dataset")]
)
def test_missing_files_are_named(root, kind, message):
    (path,) = files_of(root, kind)
    storage.delete(path)
    with pytest.raises(ArtefactError, match=message) as error:
        read_manifest(root)
    assert root in str(error.value)


@pytest.mark.parametrize("kind", ["versions", "manifests"])
def test_damage_is_named(root, kind):
    (path,) = files_of(root, kind)
    for position in range(0, storage.size(path) * 8, 97 if kind == "manifests" else 11):
        flip_bit(path, position)
        with pytest.raises(ArtefactError, match=f"{root}/.* is damaged|missing"):
            read_manifest(root)
        flip_bit(path, position)
    assert is_published(root) and read_manifest(root)


def test_the_root_hash_is_that_of_paths_and_contents(root):
    (part,) = read_manifest(root)["parts"]
    (path,) = files_of(root, "data")
    leaf = sha256_hex(f"{path[len(root) + 1:]}:{sha256_hex(storage.read_bytes(path))}".encode())
    assert read_manifest(root)["root_hash"] == root_hash([part]) == sha256_hex(leaf.encode())
    assert root_hash([part, {**part, "path": "other"}]) != root_hash([{**part, "path": "other"}, part])


def test_the_root_hash_depends_on_the_rows_only(root, tmp_path):
    other = str(tmp_path / "b")
    Recipe().write_shard(other, 1)
    Recipe().write(other)
    assert read_manifest(other)["root_hash"] == read_manifest(root)["root_hash"]
    fewer = Recipe(bad_images=(5, 6)).write(tmp_path / "c")
    assert read_manifest(fewer)["root_hash"] != read_manifest(root)["root_hash"]


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(),
        Recipe(num_classes=0),
        Recipe(conditions=("depth", "edges")),
        Recipe(remap_unused=True, used_codes=(3, 9)),
    ],
)
def test_the_row_format_follows_from_the_manifest(recipe, tmp_path):
    found = row_format_of(read_manifest(recipe.write(tmp_path)))
    assert found == recipe.row_format.with_codebook_size(2 if recipe.remap_unused else 20)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"format_version": 2}, "knows tessera-code-dataset 1"),
        ({"format": "another"}, "has format another 1"),
        ({"views": ["one"]}, "must add up"),
        ({"root_hash": "0" * 64}, "root hash"),
        ({"parts": []}, "must add up"),
        ({"codec": {"bits": 4, "bytes_per_row": 4, "num_codes": 6, "codebook_size": 20}}, "needs 5 and 4"),
        ({"codec": {"bits": 5, "bytes_per_row": 5, "num_codes": 6, "codebook_size": 20}}, "needs 5 and 4"),
        (
            {"codec": {"bits": 5, "bytes_per_row": 4, "num_codes": 6, "codebook_size": 20, "remap": [1]}},
            "needs 1 and 1",
        ),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(root, change, message):
    """Also when every hash was made to fit, as another writer's mistake would be."""
    replace_manifest(root, read_manifest(root) | change)
    with pytest.raises(ArtefactError, match=message):
        CodeDataset.open(root, verify=False)
