"""The same promises for local folders and a real S3 server."""

import errno
import os
import signal
import subprocess
import sys
import tempfile
import time
from multiprocessing.pool import ThreadPool
from pathlib import Path

import pytest
from s3_support import FAULTS, break_store

from pipeline import storage
from stages.errors import ConfigError, StorageError

ROOT = Path(__file__).parents[2]


@pytest.fixture(params=["local", "s3"])
def folder(request, tmp_path):
    return str(tmp_path / "folder") if request.param == "local" else request.getfixturevalue("s3")


def test_written_bytes_are_read_back(folder):
    path = storage.join(folder, "a", "b.bin")
    assert not storage.exists(path)
    assert storage.put_if_absent(path, b"0123456789")
    assert storage.exists(path) and storage.size(path) == 10
    assert storage.read_bytes(path) == b"0123456789"
    assert storage.read_range(path, 3, 4) == b"3456"
    assert storage.read_range(path, 8, 100) == b"89"
    assert storage.read_range(path, 3, 0) == b""


def test_the_first_writer_wins(folder, tmp_path):
    path = storage.join(folder, "receipt.json")
    file = tmp_path / "file"
    file.write_bytes(b"third")
    assert storage.put_if_absent(path, b"first")
    assert not storage.put_if_absent(path, b"second")
    assert not storage.put_file_if_absent(path, str(file))
    assert storage.read_bytes(path) == b"first"


def test_one_of_many_racing_writers_wins(folder):
    with ThreadPool(4) as pool:
        for race in range(3):
            path = storage.join(folder, f"race-{race}")
            won = pool.map(lambda i: storage.put_if_absent(path, b"%d" % i), range(4))
            assert sum(won) == 1
            assert storage.read_bytes(path) == b"%d" % won.index(True)


def test_files_are_uploaded_whole(folder, tmp_path):
    file = tmp_path / "file"
    file.write_bytes(os.urandom(1 << 20))
    path = storage.join(folder, "copy")
    assert storage.put_file_if_absent(path, str(file))
    assert storage.read_bytes(path) == file.read_bytes()


@pytest.mark.parametrize("write", [storage.put_if_absent, storage.replace])
@pytest.mark.parametrize(
    "name, content_type", [("report.html", "text/html"), ("grid.png", "image/png"), ("record.json", "application/json")]
)
def test_a_browser_is_told_what_a_file_is(s3, write, name, content_type):
    path = storage.join(s3, name)
    write(path, b"content")
    assert storage._fs().info(path, refresh=True)["ContentType"] == content_type


def test_a_multipart_upload_does_not_overwrite(s3, tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_bytes(os.urandom(12 << 20))
    path = storage.join(s3, "large")
    fs = storage._fs()
    monkeypatch.setattr(storage, "_fs", lambda: fs)
    put_file = fs.put_file
    monkeypatch.setattr(fs, "put_file", lambda *a, **k: put_file(*a, chunksize=5 << 20, **k))
    assert storage.put_file_if_absent(path, str(file))
    assert not storage.put_file_if_absent(path, str(file))
    assert storage.read_bytes(path) == file.read_bytes()


def test_missing_files(folder):
    path = storage.join(folder, "nothing")
    chunks = lambda p: list(storage.read_chunks(p))  # noqa: E731
    for read in (storage.read_bytes, storage.size, lambda p: storage.read_range(p, 0, 1), chunks, storage.local_copy):
        if read is storage.local_copy and storage.is_local(path):
            continue
        with pytest.raises(FileNotFoundError):
            read(path)
    assert storage.list_files(folder) == []
    storage.delete(path)
    storage.delete_tree(folder)


def test_listing_is_recursive_sorted_and_filtered(folder):
    for name in ("b/2.json", "a.json", "b/1.txt", "b/c/3.json"):
        storage.put_if_absent(storage.join(folder, name), b"x")
    names = [path[len(folder) + 1 :] for path in storage.list_files(folder, suffix=".json")]
    assert names == ["a.json", "b/2.json", "b/c/3.json"]
    assert len(storage.list_files(folder)) == 4
    storage.put_if_absent(storage.join(folder, "a0"), b"four")
    sizes = storage.list_sizes(folder)
    assert list(sizes) == storage.list_files(folder) and sizes[storage.join(folder, "a0")] == 4
    storage.delete(storage.join(folder, "a0"))
    storage.delete_tree(storage.join(folder, "b"))
    assert storage.list_files(folder) == [storage.join(folder, "a.json")]


def test_links_to_folders_are_followed_where_asked_for_and_list_no_file_twice(tmp_path):
    for name in ("all/cats/1", "all/cats/deep/2", "elsewhere/dogs/3"):
        storage.put_if_absent(str(tmp_path / name), b"x")
    links = {"dogs": "elsewhere/dogs", "hounds": "elsewhere/dogs", "favourites": "all/cats", "up": ".", "cats/self": "all"}
    for name, target in links.items():
        os.symlink(tmp_path / target, tmp_path / "all" / name)
    os.symlink(tmp_path / "all", tmp_path / "elsewhere" / "dogs" / "back")

    def below(**options):
        return [path.removeprefix(f"{tmp_path}/all/") for path in storage.list_files(str(tmp_path / "all"), **options)]

    assert below() == ["cats/1", "cats/deep/2"]
    assert below(follow_links=True) == ["cats/1", "cats/deep/2", "dogs/3"]
    assert len(storage.list_sizes(str(tmp_path / "all"), follow_links=True)) == 3


@pytest.mark.parametrize("listing", [storage.list_files, storage.list_sizes, lambda path: storage.list_temporary_files(path, 0.0)])
def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path, listing):
    (tmp_path / "cats").mkdir()
    os.symlink("owls", tmp_path / "owls")  # a fault that root meets, too
    with pytest.raises(StorageError, match=f"^path is {tmp_path}, but it cannot be listed .*owls.* Let this user read it"):
        listing(str(tmp_path))


def test_a_link_that_leads_nowhere_is_listed_without_a_size(tmp_path):
    (tmp_path / "a").write_bytes(b"four")
    os.symlink("nowhere", tmp_path / "b")
    assert storage.list_sizes(str(tmp_path)) == {f"{tmp_path}/a": 4, f"{tmp_path}/b": None}


def test_replace_overwrites(folder):
    path = storage.join(folder, "report.html")
    storage.replace(path, b"old")
    storage.replace(path, b"new")
    assert storage.read_bytes(path) == b"new"
    assert storage.list_files(folder) == [path]


def test_local_copy_follows_the_contents(folder):
    path = storage.join(folder, "file")
    for data in (b"one", b"two"):
        storage.replace(path, data)
        with open(storage.local_copy(path), "rb") as file:
            assert file.read() == data


def test_many_readers_of_a_machine_share_one_download(s3, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    path, download, downloads = storage.join(s3, "file"), storage.download, []
    storage.replace(path, b"data")

    def slow(*paths):
        downloads.append(paths)
        time.sleep(0.2)
        download(*paths)

    monkeypatch.setattr(storage, "download", slow)
    with ThreadPool(8) as pool:
        copies = set(pool.map(storage.local_copy, [path] * 8))
    assert len(copies) == len(downloads) == 1 and Path(copies.pop()).read_bytes() == b"data"


def test_a_download_that_fails_leaves_nothing(s3, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    path = storage.join(s3, "file")
    storage.replace(path, b"data")

    def fail(path, local_file):
        Path(local_file).write_bytes(b"da")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as context:
        context.setattr(storage, "download", fail)
        for _ in range(2):
            with pytest.raises(OSError, match="No space left"):
                storage.local_copy(path)
    assert [file.stat().st_size for file in tmp_path.rglob("*") if file.is_file()] == [0], "its lock alone"
    assert Path(storage.local_copy(path)).read_bytes() == b"data"


def test_large_files_are_read_in_pieces_and_downloaded(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "CHUNK_BYTES", 1000)
    path, data = storage.join(folder, "file"), os.urandom(2500)
    storage.put_if_absent(path, data)
    pieces = list(storage.read_chunks(path))
    assert [len(piece) for piece in pieces] == [1000, 1000, 500] and b"".join(pieces) == data
    storage.download(path, str(tmp_path / "download"))
    assert (tmp_path / "download").read_bytes() == data


def test_a_file_is_opened_to_read_and_seek(folder):
    path = storage.join(folder, "file")
    with pytest.raises(FileNotFoundError):
        with storage.open_read(path) as file:
            file.read()
    storage.put_if_absent(path, b"0123456789")
    with storage.open_read(path) as file:
        assert file.read(2) == b"01"
        file.seek(-3, os.SEEK_END)
        assert file.read() == b"789"
    assert file.closed


def test_a_file_knows_when_it_was_written(folder):
    path = storage.join(folder, "file")
    assert storage.modified_time(path) == float("inf"), "what is gone is not old"
    started = time.time()
    storage.put_if_absent(path, b"x")
    assert started - 60 < storage.modified_time(path) < time.time() + 60


def test_unfinished_files_are_listed_apart_when_they_are_old(folder, tmp_path):
    storage.put_if_absent(storage.join(folder, "a", "done"), b"x")
    assert storage.list_temporary_files(folder, older_than=time.time() + 60) == []
    old, new = (tmp_path / "folder" / "a" / f"{storage.TEMPORARY}{name}" for name in ("old", "new"))
    for path in (old, new):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"half")
    os.utime(old, (1000, 1000))
    expected = [str(old)] if storage.is_local(folder) else []
    assert storage.list_temporary_files(folder, older_than=2000) == expected


def test_half_written_files_are_not_listed(tmp_path):
    code = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
from pipeline import storage
os.link = lambda *_: os.kill(os.getpid(), {int(signal.SIGKILL)})
storage.put_if_absent({str(tmp_path / "receipt.json")!r}, b"data")
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    assert len(os.listdir(tmp_path)) == 1, "the dead writer left its temporary file"
    assert storage.list_files(str(tmp_path)) == []
    assert storage.put_if_absent(str(tmp_path / "receipt.json"), b"data")


def test_a_failed_write_leaves_nothing(tmp_path):
    with pytest.raises(TypeError):
        storage.put_if_absent(str(tmp_path / "file"), "text is not bytes")
    assert os.listdir(tmp_path) == []


def test_paths():
    assert storage.join("a/", "/b/", "c") == "a/b/c"
    assert storage.absolute("a") == os.path.abspath("a")
    assert storage.absolute("s3://bucket/key/") == "s3://bucket/key"
    assert not storage.is_local(storage.absolute("s3://"))
    assert storage.is_local("/a") and not storage.is_local("s3://bucket/a")


@pytest.mark.parametrize("path", ["gs://bucket/x", "s3a://bucket/x", "S3://bucket/x", "s3:/bucket/x", "file:///tmp/x", "https://host/x"])
def test_an_address_that_is_none_of_s3_is_no_local_folder(path):
    rule = f"path is {path}, but a path is local or begins with s3://"
    for function in (storage.is_local, storage.absolute, storage.exists, storage.read_bytes):
        with pytest.raises(ConfigError, match=rule):
            function(path)
    with pytest.raises(ConfigError, match=f"codes.{rule}"):
        storage.check_reachable("codes.path", path)


@pytest.mark.parametrize("path", ["a:b", "12:/b", "./gs://x", "/mnt/gs://x", "depth=a:/b"])
def test_local_names_with_colons_are_local(path):
    assert storage.is_local(path)


def test_the_probe_accepts_a_store_that_refuses_and_leaves_nothing(folder):
    storage.check_conditional_put(folder)
    assert storage.list_files(folder) == []


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_a_store_are_named_with_the_way_out(s3_server, tmp_path, monkeypatch, fault):
    file = tmp_path / "file"
    file.write_bytes(b"data")
    path, words = break_store(monkeypatch, fault)
    uses = {
        "exists": lambda: storage.exists(f"{path}/file"),
        "size": lambda: storage.size(f"{path}/file"),
        "read_bytes": lambda: storage.read_bytes(f"{path}/file"),
        "read_range": lambda: storage.read_range(f"{path}/file", 0, 1),
        "list_files": lambda: storage.list_files(path),
        "local_copy": lambda: storage.local_copy(f"{path}/file"),
        "delete_tree": lambda: storage.delete_tree(path),
        "put_if_absent": lambda: storage.put_if_absent(f"{path}/file", b"data"),
        "put_file_if_absent": lambda: storage.put_file_if_absent(f"{path}/file", str(file)),
        "replace": lambda: storage.replace(f"{path}/file", b"data"),
    }
    for name, use in uses.items():
        with pytest.raises(StorageError) as caught:
            use()
        text = str(caught.value)
        assert text.startswith(f"path is {path}") and all(word in text for word in words), (name, text)
        assert isinstance(caught.value, OSError), "what retries faults of storage retries this one"
    with pytest.raises(StorageError, match=f"^codes.path is {path}, but ") as caught:
        storage.check_reachable("codes.path", path)
    assert all(word in str(caught.value) for word in words)


def test_a_store_that_answers_is_reachable_whether_or_not_anything_is_there(folder):
    storage.check_reachable("codes.path", folder)


def test_faults_of_local_files_are_not_blamed_on_the_store(s3, tmp_path):
    with pytest.raises(FileNotFoundError):
        storage.put_file_if_absent(storage.join(s3, "file"), str(tmp_path / "missing"))
