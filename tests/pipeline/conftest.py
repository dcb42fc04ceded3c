"""A real S3 server on the loopback device, and small code datasets."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass

import numpy as np
import pytest

from pipeline import storage
from pipeline.code_dataset.codec import bytes_per_row, num_bits
from pipeline.code_dataset.parts import PartRows
from pipeline.code_dataset.plan import freeze, make_plan
from pipeline.code_dataset.publish import publish
from pipeline.code_dataset.receipts import commit_shard, read_receipts
from pipeline.sources import listing

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
        -master.port={master} -volume.port={volume} -filer.port={filer} -s3.port={s3} -s3.port.iceberg=0 -s3.port.lance=0 -admin.ui=false -webdav=false"""
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


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A small code dataset, and writing it shard by shard without Ray."""

    num_images: int = 20
    num_views: int = 2
    num_classes: int = 3
    shard_size: int = 8
    grid: tuple[int, int] = (2, 3)
    codebook_size: int = 20
    bad_images: tuple[int, ...] = (5,)

    @property
    def codes(self):
        """Of every image that is not bad, (images, views, L)."""
        shape = (self.num_images, self.num_views, self.grid[0] * self.grid[1])
        codes = np.random.default_rng(0).integers(0, self.codebook_size, shape)
        return np.delete(codes, self.bad_images, axis=0)

    @property
    def image_ids(self):
        return np.delete(100 + np.arange(self.num_images), self.bad_images)

    def labels(self, image_ids):
        return image_ids % self.num_classes if self.num_classes else np.full(len(image_ids), -1)

    @property
    def plan(self):
        ids = 100 + np.arange(self.num_images)
        labels = self.labels(ids) if self.num_classes else None
        identity = {"class_names": [f"class {i}" for i in range(self.num_classes)], "codebook_size": self.codebook_size}
        return make_plan(listing(ids, [f"image-{i}" for i in ids], labels), identity, self.shard_size)

    def write_shard(self, root, shard, codes=None):
        is_mine = (self.image_ids - 100) // self.shard_size == shard
        ids, codes = self.image_ids[is_mine], self.codes[is_mine] if codes is None else codes
        rows = PartRows(
            codes=codes.reshape(-1, codes.shape[-1]),
            image_ids=ids.repeat(self.num_views),
            views=np.tile(np.arange(self.num_views), len(ids)),
            labels=self.labels(ids).repeat(self.num_views) if self.num_classes else None,
        )
        bad = [
            {"image_id": 100 + i, "uri": f"image-{i}", "stage": "decode", "kind": "empty", "message": "-", "sha256": "0" * 64}
            for i in self.bad_images
            if i // self.shard_size == shard
        ]
        return commit_shard(
            root,
            self.plan.fingerprint,
            shard,
            rows=rows,
            quarantined=bad,
            codebook_size=self.codebook_size,
            num_views=self.num_views,
        )

    def write(self, root):
        """The published dataset; returns its folder."""
        root, plan = str(root), self.plan
        freeze(root, plan)
        for shard in range(plan.num_shards):
            self.write_shard(root, shard)
        publish(root, read_receipts(root, plan.fingerprint, plan.num_shards), self.description)
        return root

    @property
    def description(self):
        num_codes, bits = self.grid[0] * self.grid[1], num_bits(self.codebook_size)
        codec = {"bits": bits, "bytes_per_row": bytes_per_row(num_codes, bits), "num_codes": num_codes}
        return {
            "plan_fp": self.plan.fingerprint,
            "class_names": self.plan.identity["class_names"],
            "views": [f"view {i}" for i in range(self.num_views)],
            "grid": list(self.grid),
            "tokenizer": {"fingerprint": "f" * 64},
            "codec": {"name": "pack_le", **codec, "codebook_size": self.codebook_size},
        }


@pytest.fixture
def recipe():
    """The class, so that a test may change what it needs."""
    return Recipe
