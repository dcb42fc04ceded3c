"""A real S3 server on the loopback device."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid

import pytest

from pipeline import storage

BUCKET = "codes"


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory):
    """SeaweedFS for the whole test run, found by the standard AWS environment variables."""
    ports = free_ports(4)
    folder = tmp_path_factory.mktemp("seaweedfs")
    environment = {
        "AWS_ACCESS_KEY_ID": "testkey",
        "AWS_SECRET_ACCESS_KEY": "testsecret12345",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{ports[3]}",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        command = server_command(folder, ports)
        server = subprocess.Popen(command, env=server_environment(), stderr=subprocess.DEVNULL, cwd=folder)
        try:
            wait_until_ready(server)
            yield environment
        finally:
            server.send_signal(signal.SIGKILL)
            server.wait()
            shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def s3(s3_server):
    """A fresh s3:// prefix."""
    return f"s3://{BUCKET}/{uuid.uuid4().hex}"


def free_ports(count):
    """Ports such that +10000, which SeaweedFS uses for gRPC, is a port too."""
    sockets = []
    while len(sockets) < count:
        candidate = socket.socket()
        candidate.bind(("127.0.0.1", 20000 + int.from_bytes(os.urandom(2), "little") % 8000))
        sockets.append(candidate)
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def server_command(folder, ports):
    master, volume, filer, s3 = ports
    weed = os.path.join(os.path.dirname(sys.executable), "weed")
    options = f"""-ip=127.0.0.1 -ip.bind=127.0.0.1 -dir={folder} -bucket={BUCKET}
        -master.port={master} -volume.port={volume} -filer.port={filer} -s3.port={s3}
        -s3.port.iceberg=0 -s3.port.lance=0 -admin.ui=false -webdav=false"""
    return [weed, "-logdir", str(folder), "mini", *options.split()]


def server_environment():
    return {**os.environ, "GOMEMLIMIT": "300MiB", "GOGC": "50"}


def wait_until_ready(server, seconds=60):
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
