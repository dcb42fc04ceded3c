"""What the whole suite shares: one Ray instance, tiny artefacts, a deterministic torch."""

import os
import shutil
import tempfile
import uuid

# Before Ray is imported anywhere: short socket paths, own instance, quick controller polls.
os.environ.setdefault("RAY_memory_monitor_refresh_ms", "0")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.1")
os.environ.setdefault("RAY_TRAIN_ENABLE_STATE_ACTOR_RECONCILIATION", "0")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny convolutions crawl when threads wait for each other
os.environ.pop("RAY_ADDRESS", None)
# What Ray's workers import besides Tessera. Not all of tests/, whose folders would hide packages of the same names.
WORKER_MODULES = os.path.join(os.path.dirname(__file__), "worker_modules")
os.environ["PYTHONPATH"] = os.pathsep.join([WORKER_MODULES, *filter(None, [os.environ.get("PYTHONPATH")])])

import hypothesis  # noqa: E402
import pytest  # noqa: E402
from s3_support import BUCKET, running_server  # noqa: E402

hypothesis.settings.register_profile("untimed", deadline=None)  # no test judges time
hypothesis.settings.load_profile("untimed")


@pytest.fixture(scope="session")
def ray_cluster(s3_server):
    """One local Ray with two CPUs for the whole test run; its workers find the S3 server by the environment that they inherit."""
    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")
    os.makedirs(os.path.join(folder, "ray"))
    previous = os.environ.get("RAY_TMPDIR")
    os.environ["RAY_TMPDIR"] = folder
    from cluster.runtime import connected

    with connected(num_cpus=2, object_store_bytes=512 << 20):
        yield
    os.environ.pop("RAY_TMPDIR")
    if previous is not None:
        os.environ["RAY_TMPDIR"] = previous
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory):
    """SeaweedFS for the whole test run, found by the standard AWS environment variables, which it gives."""
    folder = str(tmp_path_factory.mktemp("seaweedfs"))
    with running_server(folder) as environment:
        yield environment
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def s3(s3_server):
    """A fresh s3:// prefix."""
    return f"s3://{BUCKET}/{uuid.uuid4().hex}"
