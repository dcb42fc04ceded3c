"""Hooks: the same JSON to a command and to a URL; what fails is an error that names it."""

import http.server
import json
import threading

import pytest

from evaluation.hooks import check_hooks, hooks_of, notify
from stages.errors import ConfigError, TesseraError
from stages.options import NightlyOptions

MESSAGE = {"page": "report.html", "regressions": [{"metric": "gfd"}]}


@pytest.fixture
def receiver():
    """An HTTP server that answers a path /CODE with that code; yields its URL and the bodies it was sent."""
    bodies = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            bodies.append((self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"])))))
            code = 500 if self.path == "/broken" else int(self.path[1:]) if self.path[1:].isdigit() else 204
            self.send_response(code)
            if 300 <= code < 400:
                self.send_header("Location", "/elsewhere")
            self.end_headers()

        def do_GET(self):
            bodies.append((self.path, None))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", bodies
    server.shutdown()


def test_only_hooks_that_are_set_are_there():
    assert hooks_of(NightlyOptions()) == {}
    assert hooks_of(NightlyOptions(command="a", webhook="b")) == {"command": "a", "webhook": "b"}


@pytest.mark.parametrize(
    "webhook, words",
    [("https://x.org/$NOT_SET/${NOR_THIS}", "there is no NOT_SET, NOR_THIS in the environment"), ("x.org", "begins with http")],
)
def test_a_webhook_that_cannot_be_one_is_refused_at_once(webhook, words):
    with pytest.raises(ConfigError, match=words):
        check_hooks(NightlyOptions(webhook=webhook))


def test_a_webhook_out_of_the_environment_is_not_shown(monkeypatch):
    monkeypatch.setenv("SECRET_PART", "hush")
    with pytest.raises(ConfigError) as caught:
        check_hooks(NightlyOptions(webhook="$SECRET_PART"))
    assert "hush" not in str(caught.value)
    monkeypatch.setenv("SECRET_PART", "https://x.org")
    check_hooks(NightlyOptions(webhook="$SECRET_PART"))


def test_command_and_webhook_get_the_message(tmp_path, receiver, monkeypatch):
    url, bodies = receiver
    monkeypatch.setenv("SECRET_PART", "hush")
    notify("command", f"cat > {tmp_path}/out", MESSAGE)
    notify("webhook", f"{url}/$SECRET_PART", MESSAGE)
    assert json.loads((tmp_path / "out").read_text()) == MESSAGE
    assert bodies == [("/hush", MESSAGE)]


def test_a_failing_command_is_named():
    with pytest.raises(TesseraError, match="nightly.command is exit 7, but it fails"):
        notify("command", "exit 7", MESSAGE)


def test_a_webhook_that_refuses_or_is_not_there_is_named(receiver):
    url, _ = receiver
    for bad in (f"{url}/broken", "http://127.0.0.1:9/", "no-url"):
        with pytest.raises(TesseraError, match=f"nightly.webhook is {bad}, but it fails"):
            notify("webhook", bad, MESSAGE)


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_a_webhook_that_redirects_is_an_error_and_not_followed(receiver, code):
    url, bodies = receiver
    with pytest.raises(TesseraError, match=f"nightly.webhook is {url}/{code}, but it fails .*it redirects; name the address"):
        notify("webhook", f"{url}/{code}", MESSAGE)
    assert bodies == [(f"/{code}", MESSAGE)]


@pytest.mark.parametrize("address", ["http://127.0.0.1:9/$SECRET_PART", "$SECRET_PART"])
def test_what_the_environment_put_into_an_address_is_in_no_error(address, monkeypatch):
    monkeypatch.setenv("SECRET_PART", "hush hush")
    with pytest.raises(TesseraError, match="SECRET_PART, but it fails") as caught:
        notify("webhook", address, MESSAGE)
    assert "hush" not in str(caught.value) and caught.value.__suppress_context__
