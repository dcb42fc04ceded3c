"""Image files in folders and lists."""

import io
import os

import numpy as np
import pytest
from PIL import Image

from pipeline import storage
from pipeline.sources.contract import hashed_id
from pipeline.sources.image_folder import ImageFolder
from stages.errors import ConfigError
from stages.options import ImageOptions, SourceOptions

IMAGES = ImageOptions(size=16)


def save(path, value: int, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((18, 20, 3), value, np.uint8)).save(path, **options)


def source_at(path, **options) -> ImageFolder:
    return ImageFolder(SourceOptions(name="image-folder", path=path and str(path), **options), IMAGES)


def contents(source: ImageFolder, split: str = "train") -> dict[str, int | None]:
    """Label by the file's last two path components."""
    table = source.list_images(split)
    uris, labels = table["uri"].to_pylist(), table["label"].to_pylist()
    return {"/".join(uri.split("/")[-2:]): label for uri, label in zip(uris, labels)}


def test_a_folder_per_class(tmp_path):
    for name, count in (("dog", 2), ("cat", 3)):
        for i in range(count):
            save(tmp_path / name / f"{i}.png", 10 * i)
    source = source_at(tmp_path)
    assert source.class_names == ("cat", "dog")
    assert contents(source) == {"cat/0.png": 0, "cat/1.png": 0, "cat/2.png": 0, "dog/0.png": 1, "dog/1.png": 1}


def test_deeper_folders_belong_to_the_first(tmp_path):
    save(tmp_path / "cat" / "tabby" / "a.png", 0)
    save(tmp_path / "dog" / "b.png", 0)
    assert contents(source_at(tmp_path)) == {"tabby/a.png": 0, "dog/b.png": 1}


def test_a_flat_folder_has_no_labels(tmp_path):
    save(tmp_path / "a.png", 0)
    source = source_at(tmp_path)
    assert source.class_names == () and source.list_images("train")["label"].to_pylist() == [None]


@pytest.mark.parametrize("suffix", ["jpg", "jpeg", "JPG", "png", "webp", "bmp", "gif", "tif", "tiff"])
def test_file_types(tmp_path, suffix):
    save(tmp_path / f"a.{suffix}", 200)
    (tmp_path / "notes.md").write_text("not listed")
    source = source_at(tmp_path)
    (uri,) = source.list_images("train")["uri"].to_pylist()
    assert abs(int(source.decode(source.fetch(uri)).image[0, 0, 0]) - 200) <= 2


def test_ids_depend_only_on_the_path_below_the_root(tmp_path, monkeypatch):
    for root in ("first", "elsewhere/second"):
        for i in range(5):
            save(tmp_path / root / "cat" / f"{i}.png", i)
    monkeypatch.chdir(tmp_path)
    spellings = [tmp_path / "first", f"{tmp_path}/first/", "first", "./first", tmp_path / "elsewhere" / "second"]
    listings = [source_at(path).list_images("train")["image_id"].to_pylist() for path in spellings]
    assert all(ids == listings[0] for ids in listings)
    assert listings[0] == sorted(listings[0]) and min(listings[0]) >= 0


def test_uris_hold_in_any_working_directory(tmp_path, monkeypatch):
    save(tmp_path / "photos" / "a.png", 7)
    monkeypatch.chdir(tmp_path)
    source = source_at("photos")
    (uri,) = source.list_images("train")["uri"].to_pylist()
    monkeypatch.chdir("/")
    assert source.decode(source.fetch(uri)).image[0, 0, 0] == 7


def test_a_list_file_with_classes(tmp_path):
    save(tmp_path / "data" / "my cat.png", 1)
    save(tmp_path / "data" / "rex.png", 2)
    (tmp_path / "list.txt").write_text("data/my cat.png\tcat\n\ndata/rex.png\tdog\n")
    source = source_at(tmp_path / "list.txt")
    assert source.class_names == ("cat", "dog")
    assert contents(source) == {"data/my cat.png": 0, "data/rex.png": 1}


def test_ids_of_a_list_are_hashes_of_its_paths_as_they_are_usually_written(tmp_path):
    (tmp_path / "list.txt").write_text(f"./a/../0.png\n../up.png\n{tmp_path}/b//1.png\n/other/./2.png\n")
    ids = source_at(tmp_path / "list.txt").list_images("train")["image_id"].to_pylist()
    assert ids == sorted(map(hashed_id, ("0.png", "../up.png", "b/1.png", "/other/2.png")))


def test_a_list_may_name_files_anywhere(tmp_path):
    for folder in ("aa", "bb"):
        save(tmp_path / folder / "x.png", 0)
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "list.txt").write_text(f"{tmp_path}/aa/x.png\n{tmp_path}/bb/x.png\n")
    assert set(contents(source_at(tmp_path / "lists" / "list.txt"))) == {"aa/x.png", "bb/x.png"}


def test_a_listed_file_that_is_missing_is_that_rows_error(tmp_path):
    save(tmp_path / "there.png", 1)
    (tmp_path / "list.txt").write_text("there.png\ngone.png\n")
    source = source_at(tmp_path / "list.txt")
    uris = sorted(source.list_images("train")["uri"].to_pylist())
    with pytest.raises(FileNotFoundError):
        source.fetch(uris[0])
    assert source.decode(source.fetch(uris[1])).image[0, 0, 0] == 1


def test_holdout_by_fraction_is_stable_and_disjoint(tmp_path):
    for i in range(200):
        (tmp_path / f"{i}.png").write_bytes(b"")
    source = source_at(tmp_path, holdout_fraction=0.25, seed=1)
    train, holdout = set(contents(source)), set(contents(source, "holdout"))
    assert len(train) + len(holdout) == 200 and not train & holdout
    assert 30 <= len(holdout) <= 70
    assert set(contents(source_at(tmp_path, holdout_fraction=0.25, seed=2))) != train
    (tmp_path / "0.png").unlink()
    again = source_at(tmp_path, holdout_fraction=0.25, seed=1)
    assert set(contents(again)) == train - {f"{tmp_path.name}/0.png"}


def test_holdout_in_a_folder_of_its_own(tmp_path):
    for split, names in (("train", ("cat", "dog")), ("test", ("dog",))):
        for name in names:
            save(tmp_path / split / name / "a.png", 0)
    source = source_at(tmp_path / "train", holdout_path=str(tmp_path / "test"))
    assert len(source.list_images("train")) == 2
    assert contents(source, "holdout") == {"dog/a.png": 1}


@pytest.mark.parametrize("names", [("cat", "emu"), ("",)], ids=["a new class", "no classes"])
def test_holdout_classes_must_be_those_of_training(tmp_path, names):
    save(tmp_path / "train" / "cat" / "a.png", 0)
    for name in names:
        save(tmp_path / "test" / name / "a.png", 0)
    source = source_at(tmp_path / "train", holdout_path=str(tmp_path / "test"))
    with pytest.raises(ConfigError, match=f"source.holdout_path is {tmp_path}/test, but its class"):
        source.list_images("holdout")


def test_holdout_without_a_rule_says_what_to_set(tmp_path):
    save(tmp_path / "a.png", 0)
    with pytest.raises(ConfigError, match="holdout_fraction is 0 and source.holdout_path is not set"):
        source_at(tmp_path).list_images("holdout")


def test_a_folder_and_a_list_on_s3(s3):
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (9, 9, 9)).save(buffer, "PNG")
    for name in ("cat/a.png", "dog/b.png"):
        storage.replace(f"{s3}/images/{name}", buffer.getvalue())
    storage.replace(f"{s3}/images/list.txt", b"dog/b.png\tdog\n")
    folder = source_at(f"{s3}/images/")
    assert contents(folder) == {"cat/a.png": 0, "dog/b.png": 1}
    (uri,) = source_at(f"{s3}/images/list.txt").list_images("train")["uri"].to_pylist()
    assert folder.decode(folder.fetch(uri)).image[0, 0, 0] == 9
    with pytest.raises(FileNotFoundError):
        folder.fetch(f"{s3}/images/gone.png")


def write_list(tmp_path, text: str):
    (tmp_path / "list.txt").write_bytes(text.encode("latin-1"))
    return tmp_path / "list.txt"


BAD_INPUT = {
    "no path": (lambda tmp_path: None, "source.path is not set"),
    "missing folder": (lambda tmp_path: tmp_path / "nowhere", "but there are no images in it"),
    "empty folder": (lambda tmp_path: tmp_path, "but there are no images in it"),
    "missing list": (lambda tmp_path: tmp_path / "list.tsv", "there is no such list file"),
    "empty list": (lambda tmp_path: write_list(tmp_path, "\n\n"), "but the list is empty"),
    "some classes": (lambda tmp_path: write_list(tmp_path, "a.png\tcat\nb.png\n"), "only some of its lines name"),
    "twice the same": (lambda tmp_path: write_list(tmp_path, "a.png\na.png\n"), "have the same image_id"),
    "twice the same, spelled otherwise": (
        lambda tmp_path: write_list(tmp_path, f"0.png\n./0.png\n{tmp_path}//0.png\n"),
        "two of its images have the same image_id, that of .*/0.png",
    ),
    "an address": (lambda tmp_path: write_list(tmp_path, "gs://bucket/a.png\n"), "A line of .*list.txt is gs://bucket/a.png, but a path"),
    "not text": (lambda tmp_path: write_list(tmp_path, "\xff\xd8\xff"), "it is not UTF-8 text"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_refused_with_the_reason(tmp_path, case):
    make, reason = BAD_INPUT[case]
    with pytest.raises(ConfigError, match=reason):
        source_at(make(tmp_path)).list_images("train")


def test_files_beside_class_folders_are_refused(tmp_path):
    save(tmp_path / "cat" / "a.png", 0)
    save(tmp_path / "stray.png", 0)
    with pytest.raises(ConfigError, match="stray.png lies beside them"):
        source_at(tmp_path).list_images("train")


def test_fetch_gives_the_bytes_of_the_file(tmp_path):
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "PNG")
    (tmp_path / "a.png").write_bytes(buffer.getvalue())
    source = source_at(tmp_path)
    assert source.fetch(source.list_images("train")["uri"][0].as_py()) == buffer.getvalue()


def test_a_listing_has_the_sizes_of_files_on_disk_and_s3(tmp_path, s3):
    save(tmp_path / "cat" / "a.png", 0)
    save(tmp_path / "dog" / "b.png", 7)
    (tmp_path / "list.txt").write_text("cat/a.png\tcat\ngone.png\tdog\n")
    sizes = {path.name: path.stat().st_size for path in tmp_path.rglob("*.png")}
    for name in sizes:
        folder = "cat" if name == "a.png" else "dog"
        storage.put_if_absent(f"{s3}/{folder}/{name}", (tmp_path / folder / name).read_bytes())
    tables = [source_at(path).list_images("train") for path in (tmp_path, s3)]
    assert tables[0]["num_bytes"].to_pylist() == tables[1]["num_bytes"].to_pylist()
    found = {uri.rpartition("/")[2]: n for uri, n in zip(tables[0]["uri"].to_pylist(), tables[0]["num_bytes"].to_pylist())}
    assert found == sizes
    listed = source_at(tmp_path / "list.txt").list_images("train")
    assert set(listed["num_bytes"].to_pylist()) == {sizes["a.png"], None}


def test_a_store_is_listed_once_for_images_and_classes_and_not_for_reading(s3, monkeypatch):
    for name in ("cat/a.png", "dog/b.png"):
        storage.put_if_absent(f"{s3}/{name}", name.encode())
    listings = []
    for name in ("list_files", "list_sizes"):
        listing = getattr(storage, name)
        monkeypatch.setattr(storage, name, lambda path, listing=listing, **options: (listings.append(path), listing(path, **options))[1])
    source = source_at(s3)
    assert source.fetch(f"{s3}/cat/a.png") == b"cat/a.png" and listings == []
    assert len(source.list_images("train")) == 2 and source.class_names == ("cat", "dog") and listings == [s3]
    assert source_at(s3).class_names == ("cat", "dog")


def test_a_class_that_is_a_link_counts(tmp_path):
    for name in ("all/cat/a.png", "elsewhere/b.png"):
        storage.put_if_absent(str(tmp_path / name), name.encode())
    os.symlink(tmp_path / "elsewhere", tmp_path / "all" / "dog")
    source = source_at(tmp_path / "all")
    assert len(source.list_images("train")) == 2 and source.class_names == ("cat", "dog")
