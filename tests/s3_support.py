"""A real S3 server on the loopback device: SeaweedFS, started and stopped by tests."""

import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import s3fs

from pipeline import storage

BUCKET = "codes"
CLOSED_PORT = 9  # discard: nothing listens there

# What can be wrong with a store: how to connect, a path, and what the error has to say.
FAULTS: dict[str, tuple[dict[str, Any], str, tuple[str, ...]]] = {
    "no bucket": ({}, "s3://no-such-bucket/folder", ("there is no bucket no-such-bucket", "Create it")),
    "wrong secret": (
        {"key": "testkey", "secret": "wrong"},
        f"s3://{BUCKET}/folder",
        ("refuses access", "AWS_SECRET_ACCESS_KEY"),
    ),
    "no server": (
        {"endpoint_url": f"http://127.0.0.1:{CLOSED_PORT}", "config_kwargs": {"retries": {"max_attempts": 0}}},
        f"s3://{BUCKET}/folder",
        ("cannot be reached", "AWS_ENDPOINT_URL"),
    ),
    "no scheme": (
        {"endpoint_url": "127.0.0.1:1"},
        f"s3://{BUCKET}/folder",
        ("Invalid endpoint", "AWS_ENDPOINT_URL"),
    ),
    "bad name": ({}, "s3://no:bucket/folder", ("no place in an S3 store", "Write s3://bucket/folder")),
}


def break_store(monkeypatch: pytest.MonkeyPatch, fault: str) -> tuple[str, tuple[str, ...]]:
    """Lets storage meet a fault of `FAULTS`; returns a path to use and what its error has to say."""
    options, path, words = FAULTS[fault]
    fs = s3fs.S3FileSystem(use_listings_cache=False, skip_instance_cache=True, **options)
    monkeypatch.setattr(storage, "_fs", lambda: fs)
    return path, words


class Server:
    """SeaweedFS with its data in a folder, for a `with` statement; it can be killed and started again in between.

    Sets the AWS environment variables that lead to it.
    """

    def __init__(self, folder: str):
        self._folder = folder
        self._ports = free_ports(4)
        self._patch = pytest.MonkeyPatch()
        self.environment = {
            "AWS_ACCESS_KEY_ID": "testkey",
            "AWS_SECRET_ACCESS_KEY": "testsecret12345",
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self._ports[3]}",
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def __enter__(self) -> "Server":
        for name, value in self.environment.items():
            self._patch.setenv(name, value)
        forget_connections()
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()
        self._patch.undo()
        forget_connections()

    def start(self) -> None:
        command = server_command(self._folder, self._ports)
        self._process = subprocess.Popen(
            command, env=server_environment(), stderr=subprocess.DEVNULL, cwd=self._folder
        )
        wait_until_ready(self._process)

    def kill(self) -> None:
        """SIGKILL."""
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()


def forget_connections() -> None:
    """Lets this process connect anew, to where the environment variables now lead."""
    storage._fs.cache_clear()
    s3fs.S3FileSystem.clear_instance_cache()


@contextmanager
def running_server(folder: str) -> Iterator[dict[str, str]]:
    """SeaweedFS with its data in `folder`; yields, and sets, the AWS environment variables that lead to it."""
    with Server(folder) as server:
        yield server.environment


def free_ports(count: int) -> list[int]:
    """Ports that are free with those 10000 above them, which SeaweedFS uses for gRPC; all below those that connections are given."""
    with ExitStack() as held:
        ports: list[int] = []
        while len(ports) < count:
            port = random.randrange(20000, 22700)
            try:
                for number in (port, port + 10000):
                    held.enter_context(socket.socket()).bind(("127.0.0.1", number))
            except OSError:
                continue
            ports.append(port)
        return ports


def server_command(folder: str, ports: list[int]) -> list[str]:
    master, volume, filer, s3 = ports
    weed = os.path.join(os.path.dirname(sys.executable), "weed")
    options = f"""-ip=127.0.0.1 -ip.bind=127.0.0.1 -dir={folder} -bucket={BUCKET}
        -master.port={master} -volume.port={volume} -filer.port={filer} -s3.port={s3}
        -s3.port.iceberg=0 -s3.port.lance=0 -admin.ui=false -webdav=false
        -s3.autoCreateBucket=false -master.telemetry=false"""
    return [weed, "-logdir", folder, "mini", *options.split()]


def server_environment() -> dict[str, str]:
    return {**os.environ, "GOMEMLIMIT": "300MiB", "GOGC": "50"}


def wait_until_ready(server: subprocess.Popen, seconds: float = 60) -> None:
    """Listing answers before writing does, so a write is what is waited for."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            storage.replace(f"s3://{BUCKET}/ready", b"")
            return
        except OSError:
            if server.poll() is not None or time.monotonic() > deadline:
                raise
            time.sleep(0.2)
