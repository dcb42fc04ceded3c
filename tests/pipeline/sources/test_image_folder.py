"""Image files in folders and lists."""

import io
import logging
import os

import numpy as np
import pytest
from PIL import Image

from pipeline import storage
from pipeline.fetch import fetch
from pipeline.images import SUFFIXES
from pipeline.sources.contract import hashed_id
from pipeline.sources.image_folder import ImageFolder
from stages.errors import BadImage, ConfigError
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


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_of_every_format_that_can_be_decoded_is_an_image(tmp_path, suffix):
    save(tmp_path / f"a{suffix.upper()}", 200)
    save(tmp_path / "b.png", 200)
    source = source_at(tmp_path)
    uris = source.list_images("train")["uri"].to_pylist()
    assert len(uris) == 2 and all(abs(int(source.decode(source.fetch(uri)).image.flat[0]) - 200) <= 2 for uri in uris)


def test_pictures_that_cannot_be_read_are_warned_of_with_their_number(tmp_path, caplog):
    save(tmp_path / "cat" / "a.png", 0)
    for name in ("b.heic", "c.HEIC", "d.jxl"):
        (tmp_path / "cat" / name).write_bytes(b"")
    source_at(tmp_path).list_images("train")
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warning.startswith(f"source.path is {tmp_path}, where pictures that cannot be read are passed over: 2 .heic, 1 .jxl, such as")
    assert f"'{tmp_path}/cat/b.heic'" in warning


def test_companions_of_images_are_passed_over_with_their_number(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    save(tmp_path / "a.png", 0)
    for name in ("a.json", "b.json", "LICENSE", *(f"a.{i}" for i in range(9))):
        (tmp_path / name).write_bytes(b"")
    source_at(tmp_path).list_images("train")
    (record,) = [record for record in caplog.records if "passed over" in record.getMessage()]
    assert record.levelno == logging.INFO and "no images are passed over: 2 .json, 1 " in record.getMessage()
    assert f"3 others, such as '{tmp_path}/a.json'" in record.getMessage()


def test_a_folder_of_images_alone_needs_no_word(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    save(tmp_path / "a.png", 0)
    source_at(tmp_path).list_images("train")
    assert not caplog.records


@pytest.mark.parametrize("hidden", [".ipynb_checkpoints/1.png", "__MACOSX/cat/0.png", "cat/._0.png", "cat/.git/1.png", ".1.png"])
def test_hidden_files_are_neither_images_nor_classes(tmp_path, caplog, hidden):
    caplog.set_level(logging.INFO)
    root = tmp_path / ".cache"  # what lies above the root does not count
    for name in ("cat/0.png", "dog/0.png", hidden):
        save(root / name, 0)
    source = source_at(root)
    assert contents(source) == {"cat/0.png": 0, "dog/0.png": 1} and source.class_names == ("cat", "dog")
    assert f"1 hidden, such as '{root}/{hidden}'" in caplog.text


def test_a_dangling_link_is_that_images_fault_if_it_is_named_like_one(tmp_path):
    save(tmp_path / "0.png", 7)
    os.symlink("nowhere", tmp_path / "9.png")
    os.symlink("user@host.1234", tmp_path / ".#notes.txt")  # a lock of Emacs
    source = source_at(tmp_path)
    table = source.list_images("train")
    sizes = dict(zip(table["uri"].to_pylist(), table["num_bytes"].to_pylist()))
    assert sizes == {f"{tmp_path}/0.png": (tmp_path / "0.png").stat().st_size, f"{tmp_path}/9.png": None}
    with pytest.raises(BadImage) as error:
        fetch(source, f"{tmp_path}/9.png")
    assert error.value.kind == "missing"


def test_a_name_that_is_not_utf8_is_refused_if_it_is_an_images(tmp_path):
    save(tmp_path / "0.png", 7)
    for name in (b"caf\xe9.txt", b"caf\xe9.png"):
        assert len(source_at(tmp_path).list_images("train")) == 1
        with open(os.path.join(os.fsencode(tmp_path), name), "wb"):
            pass
    with pytest.raises(ConfigError, match=r"caf\\udce9.png', but that name is not UTF-8. Rename the file."):
        source_at(tmp_path).list_images("train")


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


@pytest.mark.parametrize("text", ["\ufeff0.png\n1.png", "# my images\n0.png\n\n  # more\n1.png\n", "0.png\r\n1.png\r\n"])
def test_marks_comments_and_empty_lines_are_no_images(tmp_path, text):
    for i in range(2):
        save(tmp_path / f"{i}.png", i)
    (tmp_path / "list.txt").write_bytes(text.encode())
    source = source_at(tmp_path / "list.txt")
    assert set(source.list_images("train")["uri"].to_pylist()) == {f"{tmp_path}/0.png", f"{tmp_path}/1.png"}


def test_a_list_whose_first_file_does_not_exist_is_refused(tmp_path):
    save(tmp_path / "0.png", 0)
    (tmp_path / "list.txt").write_text("0.png 3\n")
    with pytest.raises(ConfigError, match=f"path is {tmp_path}/list.txt, but the first file that it names, '{tmp_path}/0.png 3', does"):
        source_at(tmp_path / "list.txt").list_images("train")


def test_ids_of_a_list_are_hashes_of_its_paths_as_they_are_usually_written(tmp_path):
    save(tmp_path / "0.png", 0)
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
    (tmp_path / "a.png").write_bytes(b"")
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
        lambda tmp_path: write_list(tmp_path, f"a.png\n./a.png\n{tmp_path}//a.png\n"),
        "two of its images have the same image_id, that of .*/a.png",
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
