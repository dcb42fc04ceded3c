"""Fashion-MNIST from IDX files."""

import gzip
import hashlib
import os

import numpy as np
import pytest

from pipeline.sources import fashion_mnist
from pipeline.sources.fashion_mnist import FashionMnist
from stages.errors import BadImage, ConfigError
from stages.options import ImageOptions, SourceOptions

IMAGES = ImageOptions(size=28, channels=1)


def write_idx(path, values):
    header = bytes([0, 0, 8, values.ndim]) + b"".join(n.to_bytes(4, "big") for n in values.shape)
    path.write_bytes(gzip.compress(header + values.tobytes()))


@pytest.fixture
def folder(tmp_path):
    for prefix, n in (("train", 30), ("t10k", 10)):
        pixels = np.arange(n, dtype=np.uint8)[:, None, None] + np.zeros((1, 28, 28), np.uint8)
        write_idx(tmp_path / f"{prefix}-images-idx3-ubyte.gz", pixels)
        write_idx(tmp_path / f"{prefix}-labels-idx1-ubyte.gz", np.arange(n, dtype=np.uint8) % 10)
    return tmp_path


def source_at(path, **options):
    return FashionMnist(SourceOptions(name="fashion-mnist", path=path and str(path), **options), IMAGES)


def test_images_come_with_their_labels(folder):
    source = source_at(folder)
    table = source.list_images("train")
    assert table["uri"][12].as_py() == "fashion-mnist://train/12" and table["label"][12].as_py() == 2
    image = source.decode(source.fetch("fashion-mnist://train/12")).image
    assert image.shape == (28, 28, 1) and (image == 12).all()
    assert len(source.list_images("holdout")) == 10


def test_an_index_beyond_the_file_is_a_missing_file(folder):
    for index in (30, -1):
        with pytest.raises(FileNotFoundError, match="holds 30 images"):
            source_at(folder).fetch(f"fashion-mnist://train/{index}")


def test_bytes_of_another_length_are_a_bad_image(folder):
    with pytest.raises(BadImage) as error:
        source_at(folder).decode(b"\0" * 783)
    assert error.value.kind == "truncated"


def test_a_folder_without_the_files_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="train-labels-idx1-ubyte.gz is not in it"):
        source_at(tmp_path).list_images("train")


@pytest.mark.parametrize(
    "data",
    [
        b"plain text",
        gzip.compress(b"\0\0\x08\x01\0\0\0\x05abc"),
        gzip.compress(b"\0\0\x0d\x01"),
        gzip.compress(bytes(900))[:-9],
    ],
    ids=["not gzip", "fewer values than it says", "floats", "cut gzip"],
)
def test_damaged_files_are_refused(tmp_path, data):
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(data)
    with pytest.raises(ConfigError, match="is not a whole IDX file of bytes"):
        source_at(tmp_path).list_images("train")


def test_labels_of_another_dataset_are_refused(folder):
    write_idx(folder / "train-labels-idx1-ubyte.gz", np.full(30, 46, np.uint8))
    with pytest.raises(ConfigError, match="go up to 46 and there are 10 classes"):
        source_at(folder).list_images("train")


def test_without_a_path_files_are_downloaded_once_and_checked(folder, tmp_path_factory, monkeypatch):
    cache = tmp_path_factory.mktemp("cache")
    checksums = {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    monkeypatch.setattr(fashion_mnist, "SYSTEM_FOLDER", str(cache / "none"))
    monkeypatch.setattr(fashion_mnist, "HOME", folder.as_uri() + "/")
    monkeypatch.setattr(fashion_mnist, "MD5", checksums)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    assert len(source_at(None).list_images("train")) == 30
    (folder / "train-labels-idx1-ubyte.gz").unlink()
    assert len(source_at(None).list_images("train")) == 30
    with pytest.raises(ConfigError, match="cannot be reached"):
        monkeypatch.setenv("XDG_CACHE_HOME", str(cache / "another"))
        source_at(None).list_images("train")


def test_a_download_with_another_checksum_is_refused_and_not_kept(folder, tmp_path_factory, monkeypatch):
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(fashion_mnist, "SYSTEM_FOLDER", str(cache / "none"))
    monkeypatch.setattr(fashion_mnist, "HOME", folder.as_uri() + "/")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    with pytest.raises(ConfigError, match="does not have its published checksum"):
        source_at(None).list_images("train")
    assert not list(cache.rglob("*.gz*"))


if os.path.isdir(fashion_mnist.SYSTEM_FOLDER):

    def test_the_real_files():
        source = source_at(None)
        train, holdout = source.list_images("train"), source.list_images("holdout")
        assert len(train) == 60_000 and len(holdout) == 10_000
        assert np.bincount(train["label"].to_numpy()).tolist() == [6000] * 10
        first = source.decode(source.fetch("fashion-mnist://train/0")).image
        assert source.class_names[train["label"][0].as_py()] == "ankle boot"
        assert first.shape == (28, 28, 1) and first.max() == 255
