"""What the tests of kill -9 share: a small dataset, how it is written, and whether it is sound or half there."""

import json
import os
import random
import signal
import traceback

import numpy as np
import s3fs
from code_dataset_support import Recipe

from pipeline import storage
from pipeline.code_dataset import CodeDataset, compact
from pipeline.code_dataset.codec import pack, unpack
from pipeline.code_dataset.garbage import collect_garbage
from pipeline.code_dataset.manifest import is_published
from pipeline.code_dataset.plan import freeze
from pipeline.code_dataset.receipts import finished_shards
from pipeline.code_dataset.verify import verify_code_dataset
from stages.errors import ArtefactError

# Kills that each test delivers at least: in `make test`, and in the slow suite.
MIN_KILLS = {
    "points-local": (20, 200),
    "points-s3": (4, 50),
    "coordinators-local": (20, 300),
    "coordinators-s3": (4, 40),
    "tokenize-local": (2, 20),
    "tokenize-s3": (1, 20),
}
RECIPE = Recipe(
    shard_size=4,
    conditions=("depth",),
    row_group_rows=8,
    duplicate_of=((9, 2), (17, 3)),
    drop_duplicates=True,
    remap_unused=True,
    used_codes=(1, 4, 5, 9, 11),
)


def prepare():
    """Makes this process ready to fork writers: all is imported and compiled, and little data makes several parts."""
    compact.MAX_PART_BYTES = 1
    unpack(pack(np.zeros((1, 6), np.uint16), 5), 6, 5)
    RECIPE.plan  # imports pandas by way of pyarrow


def write(root):
    """Writes what is missing of the dataset in any order, publishes it and collects garbage, as `tokenize` does."""
    plan = RECIPE.plan
    freeze(root, plan)
    if not is_published(root):
        missing = set(range(plan.num_shards)) - finished_shards(root, plan.fingerprint)
        for shard in random.SystemRandom().sample(sorted(missing), len(missing)):
            RECIPE.write_shard(root, shard)
        RECIPE.write(root)
    collect_garbage(root)


def sound(root, expected_root_hash):
    """Whether a published dataset has every row once: it verifies, and is the one that nobody disturbed."""
    return verify_code_dataset(root) == [] and root_hash(root) == expected_root_hash


def root_hash(root):
    return CodeDataset.open(root, verify=True).root_hash


def half(root):
    """Whether a reader finds something between no dataset and a whole one."""
    try:
        CodeDataset.open(root, verify=True)
    except ArtefactError as error:
        return "must be a published code dataset" not in str(error)
    return False


def content(root):
    """Hash of every finished file but the version, which holds the time, by its path below the root."""
    names = [path[len(root) + 1 :] for path in storage.list_files(root)]
    return {
        name: compact.sha256_hex(storage.read_bytes(storage.join(root, name)))
        for name in names
        if not name.startswith("versions/")
    }


def fork(function, *args):
    """Process id of a child that runs a function and exits."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            function(*args)
            status = 0
        except BaseException:
            traceback.print_exc()
        os._exit(status)
    return child


def in_child(function, *args):
    """What a function returns in a forked process, so that this one stays free of threads."""
    reading, writing = os.pipe()
    child = fork(lambda: os.write(writing, json.dumps(function(*args)).encode()))
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        text = pipe.read()
    assert os.waitpid(child, 0)[1] == 0
    return json.loads(text)


def wait(child):
    """Whether a child was killed; it must have succeeded otherwise."""
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL), f"a writer failed with exit code {code}"
    return code != 0


def kill(child):
    """Kills a child; whether it was still at work."""
    os.kill(child, signal.SIGKILL)  # not waited for yet, so the number is still its own
    return wait(child)


def write_and_die(root, point, kill_at=None):
    """Writes the dataset, but dies before (even numbers) or after (odd ones) a call of a point.

    A point is a function of `os`, or "request": what changes something on S3. Returns how often it was called.
    """
    num_calls = 0

    def die_if(number):
        if number == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def deadly(*args, **kwargs):
        nonlocal num_calls
        number, num_calls = 2 * num_calls, num_calls + 1
        die_if(number)
        try:
            return call(*args, **kwargs)
        finally:
            die_if(number + 1)

    async def deadly_request(self, method, *args, **kwargs):
        nonlocal num_calls
        if not method.startswith(("put", "delete")):
            return await call(self, method, *args, **kwargs)
        number, num_calls = 2 * num_calls, num_calls + 1
        die_if(number)
        try:
            return await call(self, method, *args, **kwargs)
        finally:
            die_if(number + 1)

    if point == "request":
        call, s3fs.S3FileSystem._call_s3 = s3fs.S3FileSystem._call_s3, deadly_request
    else:
        call = getattr(os, point)
        setattr(os, point, deadly)
    write(root)
    return num_calls
