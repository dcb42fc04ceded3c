"""Local files are written whole or not at all."""

import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from stages import files


def test_of_several_writers_one_writes(tmp_path):
    path = str(tmp_path / "new" / "folder" / "file")
    contents = [bytes([i]) * 1000 for i in range(8)]
    with ThreadPoolExecutor() as pool:
        won = list(pool.map(lambda data: files.put_if_absent(path, lambda file: file.write(data)), contents))
    assert won.count(True) == 1
    with open(path, "rb") as file:
        assert file.read() == contents[won.index(True)]
    assert os.listdir(os.path.dirname(path)) == ["file"]


def test_a_file_is_replaced(tmp_path):
    path = str(tmp_path / "folder" / "file")
    for data in (b"one", b"other"):
        files.replace(path, lambda file: file.write(data))
        with open(path, "rb") as file:
            assert file.read() == data
    assert os.listdir(os.path.dirname(path)) == ["file"]


@pytest.mark.parametrize("write", [files.put_if_absent, files.replace])
def test_what_fails_leaves_nothing(tmp_path, write):
    def fail(file):
        file.write(b"half")
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        write(str(tmp_path / "file"), fail)
    assert os.listdir(tmp_path) == []


def test_a_file_that_cannot_be_replaced_leaves_nothing(tmp_path):
    (tmp_path / "file").mkdir()
    with pytest.raises(IsADirectoryError):
        files.replace(str(tmp_path / "file"), lambda file: file.write(b"new"))
    assert os.listdir(tmp_path) == ["file"]


def test_a_file_is_moved_so_that_a_power_cut_loses_neither_it_nor_its_folders(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    path, target = tmp_path / "file", tmp_path / "new" / "folder" / "moved"
    path.write_bytes(b"content")
    files.move(str(path), str(target))
    assert target.read_bytes() == b"content" and not path.exists()
    assert synced == [str(each) for each in (path, tmp_path, tmp_path / "new", tmp_path / "new" / "folder")]
