"""Images in Parquet files."""

import io
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline import storage
from pipeline.fetch import fetch
from pipeline.sources.contract import hashed_id
from pipeline.sources.parquet_files import ParquetFiles
from stages.errors import BadImage, ConfigError
from stages.options import ImageOptions, SourceOptions

IMAGES = ImageOptions(size=16)


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((18, 20, 3), value, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def write(path, row_group_size: int = 3, **columns) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=row_group_size)
    return str(path)


def source_at(path, **options) -> ParquetFiles:
    return ParquetFiles(SourceOptions(name="parquet", path=path and str(path), **options), IMAGES)


def pixel_values(source: ParquetFiles) -> dict[int, int]:
    """First pixel by image_id."""
    table = source.list_images("train")
    uris = zip(table["image_id"].to_pylist(), table["uri"].to_pylist())
    return {image_id: int(source.decode(source.fetch(uri)).image[0, 0, 0]) for image_id, uri in uris}


def test_every_row_of_every_row_group_is_read(tmp_path):
    write(tmp_path / "a.parquet", image=[png(i) for i in range(8)], image_id=list(range(8)))
    write(tmp_path / "deep" / "b.parquet", image=[png(100 + i) for i in range(4)], image_id=[20, 21, 22, 23])
    expected = {**{i: i for i in range(8)}, **{20 + i: 100 + i for i in range(4)}}
    assert pixel_values(source_at(tmp_path)) == expected


def test_structs_of_bytes_and_path(tmp_path):
    images = [{"bytes": png(5), "path": "x.png"}, {"bytes": None, "path": None}]
    path = write(tmp_path / "a.parquet", image=images, image_id=[0, 1])
    source = source_at(path)
    uris = source.list_images("train")["uri"].to_pylist()
    assert source.decode(source.fetch(uris[0])).image[0, 0, 0] == 5
    with pytest.raises(BadImage) as error:
        source.decode(source.fetch(uris[1]))
    assert error.value.kind == "empty"


@pytest.mark.parametrize("kind", [pa.binary(), pa.null()], ids=["typed", "of no type"])
def test_a_struct_without_bytes_is_read_from_its_path(tmp_path, kind):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(png(9))
    paths = ["images/a.png", str(tmp_path / "images" / "a.png"), "images/gone.png", "https://host/a.png"]
    images = pa.array([{"bytes": None, "path": path} for path in paths], pa.struct({"bytes": kind, "path": pa.string()}))
    source = source_at(write(tmp_path / "a.parquet", image=images, image_id=[0, 1, 2, 3]))
    uris = source.list_images("train")["uri"].to_pylist()
    assert [source.fetch(uri) for uri in uris[:2]] == [png(9)] * 2
    with pytest.raises(FileNotFoundError):
        source.fetch(uris[2])
    with pytest.raises(BadImage, match=r"row 3 of .*a.parquet has no bytes: .* is https://host/a.png, but a path is local"):
        source.fetch(uris[3])


@pytest.mark.parametrize("uris", [["a.png", None, ""], [None] * 3], ids=["some", "all"])
def test_a_row_without_a_uri_is_an_unusable_image(tmp_path, uris):
    (tmp_path / "a.png").write_bytes(png(9))
    source = source_at(write(tmp_path / "a.parquet", uri=uris, image_id=[0, 1, 2]))
    listed = source.list_images("train")["uri"].to_pylist()
    for row in (1, 2):
        with pytest.raises(BadImage, match=f"row {row} of {tmp_path}/a.parquet has no uri"):
            fetch(source, listed[row])


def test_uris_are_relative_to_the_file(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(png(9))
    uris = ["images/a.png", str(tmp_path / "images" / "a.png"), "images/gone.png"]
    source = source_at(write(tmp_path / "list.parquet", uri=uris, image_id=[0, 1, 2]))
    listed = source.list_images("train")["uri"].to_pylist()
    assert [source.fetch(uri) for uri in listed[:2]] == [png(9)] * 2
    with pytest.raises(FileNotFoundError):
        source.fetch(listed[2])


def test_files_on_s3(s3, tmp_path):
    with open(write(tmp_path / "a.parquet", image=[png(5)], image_id=[0]), "rb") as file:
        storage.replace(f"{s3}/a.parquet", file.read())
    storage.replace(f"{s3}/b.png", png(6))
    with open(write(tmp_path / "b.parquet", uri=["b.png"], image_id=[1]), "rb") as file:
        storage.replace(f"{s3}/b.parquet", file.read())
    assert pixel_values(source_at(s3)) == {0: 5, 1: 6}


def test_labels_and_class_names(tmp_path):
    path = write(tmp_path / "a.parquet", image=[png(0)] * 3, label=[2, 0, 2], image_id=[5, 3, 4])
    source = source_at(path)
    assert source.class_names == ("0", "1", "2")
    assert source.list_images("train")["label"].to_pylist() == [0, 2, 2]
    assert source.list_images("train")["image_id"].to_pylist() == [3, 4, 5]


@pytest.mark.parametrize("label", [{}, {"label": pa.nulls(2, pa.int64())}], ids=["no column", "all null"])
def test_images_without_labels(tmp_path, label):
    source = source_at(write(tmp_path / "a.parquet", image=[png(0)] * 2, **label))
    assert source.class_names == () and source.list_images("train")["label"].to_pylist() == [None, None]


def test_ids_of_rows_do_not_depend_on_where_the_folder_lies(tmp_path, monkeypatch):
    for root in ("first", "second"):
        write(tmp_path / root / "a.parquet", image=[png(i) for i in range(5)])
    monkeypatch.chdir(tmp_path)
    paths = [tmp_path / "first", "first", "./first/", tmp_path / "second", tmp_path / "second" / "a.parquet"]
    listings = [source_at(path).list_images("train")["image_id"].to_pylist() for path in paths]
    assert all(ids == listings[0] for ids in listings) and len(set(listings[0])) == 5


def test_ids_of_uris_are_hashes_of_what_they_stand_for(tmp_path):
    write(tmp_path / "first" / "x" / "list.parquet", uri=["a.png", "../b/./c.png", "/else/d.png"])
    write(tmp_path / "second" / "x" / "list.parquet", uri=[f"{tmp_path}/second/x/a.png", "d/../../b/c.png"])
    first, second = (dict(zip(*listed_ids(tmp_path / root))) for root in ("first", "second"))
    assert first == {"x/a.png": hashed_id("x/a.png"), "b/c.png": hashed_id("b/c.png"), "/else/d.png": hashed_id("/else/d.png")}
    assert second == {name: first[name] for name in ("x/a.png", "b/c.png")}


def listed_ids(root):
    """Paths below the root, and their ids."""
    table = source_at(root).list_images("train")
    return [os.path.normpath(uri).removeprefix(f"{root}/") for uri in table["uri"].to_pylist()], table["image_id"].to_pylist()


def test_uris_of_one_file_are_refused_but_missing_ones_are_rows_of_their_own(tmp_path):
    path = write(tmp_path / "twice.parquet", uri=["a.png", "b.png", "./a.png"])
    with pytest.raises(ConfigError, match=f"source.path is {path}, but two of its images have the same image_id, that of .*/a.png"):
        source_at(path).list_images("train")
    assert len(source_at(write(tmp_path / "missing.parquet", uri=["a.png", None, None])).list_images("train")) == 3


def test_a_row_that_is_gone_is_a_missing_file(tmp_path):
    path = write(tmp_path / "a.parquet", image=[png(0)])
    with pytest.raises(FileNotFoundError, match="has no row 1"):
        source_at(path).fetch(f"parquet://{path}#1")


def test_holdout_by_path_and_by_fraction(tmp_path):
    train = write(tmp_path / "train.parquet", image=[png(0)] * 100, label=[0, 1] * 50)
    other = write(tmp_path / "test.parquet", image=[png(1)] * 10, label=[1] * 10)
    assert len(source_at(train, holdout_path=other).list_images("holdout")) == 10
    source = source_at(train, holdout_fraction=0.3)
    held_out, kept = (set(source.list_images(split)["image_id"].to_pylist()) for split in ("holdout", "train"))
    assert len(held_out | kept) == 100 and not held_out & kept and held_out
    with pytest.raises(ConfigError, match="holdout_fraction is 0"):
        source_at(train).list_images("holdout")


def test_holdout_labels_must_be_those_of_training(tmp_path):
    train = write(tmp_path / "train.parquet", image=[png(0)], label=[0])
    other = write(tmp_path / "test.parquet", image=[png(0)], label=[4])
    with pytest.raises(ConfigError, match="source.holdout_path is .*its label 4 is not one of the 1 classes"):
        source_at(train, holdout_path=other).list_images("holdout")


ONE = [b"x"]
BAD_FILES = {
    "no image column": ({"pixels": ONE}, "has neither an image nor a uri column"),
    "negative label": ({"image": ONE, "label": [-1]}, "its labels run from -1 to -1"),
    "text label": ({"image": ONE, "label": ["cat"]}, "its label column is string"),
    "null label": ({"image": ONE * 2, "label": [1, None]}, "its label column is int64 with 1 nulls"),
    "float id": ({"image": ONE, "image_id": [0.5]}, "its image_id column is double"),
    "same id twice": ({"image": ONE * 2, "image_id": [3, 3]}, "have the same image_id"),
    "images of text": ({"image": ["a.png"]}, "its image column is string, and images are encoded images. Store their bytes, or"),
    "images of numbers": ({"image": [5]}, "its image column is int64, and images are encoded images"),
    "a struct of other things": ({"image": [{"path": "a.png"}]}, "its image column is struct<path: string>, and images are encoded"),
    "a uri of the web": ({"uri": ["a.png", "https://host/b.png"]}, "A uri of .*a.parquet is https://host/b.png, but a path is"),
    "a uri of files": ({"uri": ["file:///a.png"]}, "A uri of .*a.parquet is file:///a.png, but a path is"),
    "uris of numbers": ({"uri": [5]}, "its uri column is int64"),
    "no rows": ({"image": pa.array([], pa.binary())}, "there are no train images in it"),
    "no labelled rows": ({"image": pa.array([], pa.binary()), "label": pa.array([], pa.int64())}, "no train images"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_columns_are_refused_with_the_reason(tmp_path, case):
    columns, reason = BAD_FILES[case]
    with pytest.raises(ConfigError, match=reason):
        source_at(write(tmp_path / "a.parquet", **columns)).list_images("train")


def test_labels_in_some_files_only_are_refused(tmp_path):
    write(tmp_path / "a.parquet", image=ONE, label=[0])
    write(tmp_path / "b.parquet", image=ONE)
    with pytest.raises(ConfigError, match="only some of its rows have a label"):
        source_at(tmp_path)


def test_no_path_a_missing_one_and_a_file_of_another_kind_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="source.path is not set"):
        source_at(None)
    with pytest.raises(ConfigError, match="there are no .parquet files"):
        source_at(tmp_path / "nowhere")
    (tmp_path / "a.parquet").write_bytes(b"PAR2 and more text")
    with pytest.raises(ConfigError, match=f"{tmp_path}/a.parquet is one of the files of the source, but it is not Parquet"):
        source_at(tmp_path)


def test_a_file_that_changed_has_other_entity_tags(tmp_path):
    tags = []
    for image in (b"abc", b"abd"):
        path = tmp_path / f"{image.decode()}.parquet"
        pq.write_table(pa.table({"image": [image, b"other"]}), path)
        tags.append(source_at(path).list_images("train")["etag"].to_pylist())
    assert len({*tags[0]}) == len({*tags[1]}) == 1 and tags[0] != tags[1]
