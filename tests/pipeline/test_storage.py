"""The same promises for local folders and a real S3 server."""

import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.pool import ThreadPool
from pathlib import Path

import pytest

from pipeline import storage
from stages.errors import TesseraError

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
    for read in (storage.read_bytes, storage.size, lambda p: storage.read_range(p, 0, 1), storage.local_copy):
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
    storage.delete_tree(storage.join(folder, "b"))
    assert storage.list_files(folder) == [storage.join(folder, "a.json")]


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
    assert storage.is_local("/a") and not storage.is_local("s3://bucket/a")


def test_the_probe_accepts_a_store_that_refuses_and_leaves_nothing(folder):
    storage.check_conditional_put(folder)
    assert storage.list_files(folder) == []


class Proxy(BaseHTTPRequestHandler):
    """A store of the worst kind: keeps objects in memory, and does what its class attributes say."""

    objects: dict = {}
    ignores_conditions = False
    loses_first_answer = False
    conflicts = 0
    protocol_version = "HTTP/1.1"

    def do_PUT(self):
        store = type(self)
        body = self.body()
        if store.conflicts:
            store.conflicts -= 1
            return self.answer(409, b"<Error><Code>ConditionalRequestConflict</Code></Error>")
        if "If-None-Match" in self.headers and self.path in store.objects and not store.ignores_conditions:
            return self.answer(412, b"<Error><Code>PreconditionFailed</Code></Error>")
        store.objects[self.path] = (body, self.headers.get("x-amz-meta-writer"))
        if store.loses_first_answer:
            store.loses_first_answer = False
            return self.answer(500, b"<Error><Code>InternalError</Code></Error>")
        self.answer(200)

    def do_HEAD(self):
        if self.path in self.objects:
            self.answer(200, headers={"x-amz-meta-writer": self.objects[self.path][1]})
        else:
            self.answer(404)

    def do_DELETE(self):
        self.objects.pop(self.path, None)
        self.answer(204)

    def body(self):
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        data = b""
        while length := int(self.rfile.readline(), 16):
            data += self.rfile.read(length)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def answer(self, status, body=b"", headers=None):
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def bad_store(monkeypatch):
    """A handler class to misconfigure, behind which storage now reads and writes."""
    import s3fs

    handler = type("Store", (Proxy,), {"objects": {}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    fs = s3fs.S3FileSystem(endpoint_url=url, key="k", secret="s", use_listings_cache=False, skip_instance_cache=True)
    monkeypatch.setattr(storage, "_fs", lambda: fs)
    yield handler
    server.shutdown()
    server.server_close()


def test_a_store_that_ignores_conditions_is_refused(bad_store):
    bad_store.ignores_conditions = True
    with pytest.raises(TesseraError, match="If-None-Match"):
        storage.check_conditional_put("s3://bucket/codes")


def test_a_lost_answer_is_not_mistaken_for_a_lost_race(bad_store):
    bad_store.loses_first_answer = True
    assert storage.put_if_absent("s3://bucket/receipt", b"mine")
    assert not storage.put_if_absent("s3://bucket/receipt", b"other")


def test_conflicts_are_retried(bad_store, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda _: None)
    bad_store.conflicts = 2
    assert storage.put_if_absent("s3://bucket/receipt", b"mine")
    bad_store.conflicts = 1000
    with pytest.raises(OSError):
        storage.put_if_absent("s3://bucket/other", b"mine")
