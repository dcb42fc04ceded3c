"""Stores that break what storage relies on: refused, or borne."""

import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from pipeline import storage
from stages.errors import TesseraError


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
