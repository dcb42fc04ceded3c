"""The two splits of a source: no file is in both, however it is written."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import storage
from pipeline.sources import list_split, open_source
from stages.errors import ConfigError
from stages.options import ImageOptions, SourceOptions

IMAGES = ImageOptions(size=16)


@pytest.fixture
def folder(tmp_path):
    """Images 0 to 9, of which 8 and 9 lie in a folder of their own; lists and a Parquet file of some of them."""
    for number in range(10):
        path = tmp_path / ("set/val/train" if number > 7 else "set/train") / f"{number}.png"
        storage.put_if_absent(str(path), b"pixels")
    lists = {
        "all.txt": [f"set/train/{number}.png" for number in range(8)],
        "two.txt": ["set/val/train/8.png", "./set/train/../train/3.png"],
        "lists/two.txt": ["../set/val/train/8.png", "../set/train/3.png"],
        "whole.txt": [f"{tmp_path}/set/val/train/9.png", f"{tmp_path}/set//train/3.png"],
    }
    for name, lines in lists.items():
        storage.put_if_absent(str(tmp_path / name), "\n".join(lines).encode())
        pq.write_table(pa.table({"uri": lines}), tmp_path / name.replace(".txt", ".parquet"))
    return tmp_path


def listed(split="train", name="image-folder", **options):
    options = SourceOptions(name=name, **{key: str(value) for key, value in options.items()})
    return list_split(open_source(options, IMAGES), options, split)


@pytest.mark.parametrize("split", ["train", "holdout"])
@pytest.mark.parametrize(
    "name, path, holdout_path, num_shared, example",
    [
        ("image-folder", "set/train", "set/train", 8, ".png"),
        ("image-folder", "set", "set/val", 2, ".png"),
        ("image-folder", "all.txt", "two.txt", 1, "train/3.png"),
        ("image-folder", "all.txt", "lists/two.txt", 1, "train/3.png"),
        ("image-folder", "set/train", "whole.txt", 1, "train/3.png"),
        ("parquet", "all.parquet", "two.parquet", 1, "train/3.png"),
        ("parquet", "all.parquet", "whole.parquet", 1, "train/3.png"),
        ("parquet", "all.parquet", "all.parquet", 8, ".png"),
    ],
)
def test_a_file_that_both_paths_lead_to_is_refused_and_named(folder, split, name, path, holdout_path, num_shared, example):
    given = {"name": name, "path": folder / path, "holdout_path": folder / holdout_path}
    with pytest.raises(ConfigError) as caught:
        listed(split, **given)
    start, _, rest = str(caught.value).partition(", such as ")
    assert start.startswith(f"source.holdout_path is {folder / holdout_path}, but {num_shared} of its images are among those of source")
    assert rest.partition(" ")[0].rstrip(".").endswith(example)


def test_rows_of_one_parquet_file_in_both_are_refused(tmp_path):
    pq.write_table(pa.table({"image": [b"x", b"y"]}), tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match=f"2 of its images are among those of .*such as parquet://{tmp_path}/a.parquet#"):
        listed(name="parquet", path=tmp_path, holdout_path=tmp_path / "a.parquet")


def test_splits_that_share_no_file_pass(folder):
    given = {"path": folder / "set/train", "holdout_path": folder / "set/val/train"}
    assert [len(listed(split, **given)) for split in ("train", "holdout")] == [8, 2]


def test_held_out_images_that_are_not_there_are_told_to_who_needs_them(folder, caplog):
    given = {"path": folder / "set/train", "holdout_path": folder / "nowhere"}
    assert len(listed("train", **given)) == 8
    assert f"Training and held-out images are not compared: source.holdout_path is {folder}/nowhere, but there are no" in caplog.text
    with pytest.raises(ConfigError, match=f"source.holdout_path is {folder}/nowhere, but there are no images in it"):
        listed("holdout", **given)


def test_splits_on_s3(s3):
    for name in ("train/a.png", "val/a.png"):
        storage.put_if_absent(f"{s3}/{name}", b"pixels")
    storage.put_if_absent(f"{s3}/val.txt", b"val//a.png\n")
    assert len(listed("holdout", path=f"{s3}/train", holdout_path=f"{s3}/val")) == 1
    keys = listed("holdout", path=f"{s3}/train", holdout_path=f"{s3}/val.txt")["uri"].to_pylist()
    assert keys == [f"{s3}/val//a.png"], "another spelling may be another key"
    with pytest.raises(ConfigError, match=f"1 of its images are among .*such as {s3}/val/a.png"):
        listed("holdout", path=f"{s3}/val", holdout_path=f"{s3}/val/")


def test_one_file_under_several_ids_is_not_divided(folder):
    uris = ["set/train/1.png", f"{folder}/set/train/./1.png"] * 20
    pq.write_table(pa.table({"uri": uris, "image_id": range(40)}), folder / "ids.parquet")
    options = SourceOptions(name="parquet", path=str(folder / "ids.parquet"), holdout_fraction=0.5)
    for split in ("train", "holdout"):
        with pytest.raises(ConfigError, match="source.holdout_fraction is 0.5, but .*1.png is listed more than once"):
            open_source(options, IMAGES).list_images(split)
