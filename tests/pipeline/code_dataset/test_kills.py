"""kill -9 at every system call of the commit protocol: nothing lost, nothing repeated, old or new but never half.

A process without threads forks one writer per point of death, which is cheap and safe; it runs apart from the test process,
which has threads of Ray and S3.
"""

import ast
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
POINTS = ("fsync", "link", "unlink", "mkdir")


@pytest.mark.parametrize("point", POINTS)
def test_a_writer_killed_anywhere_is_resumed(point):
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    subprocess.run([sys.executable, __file__, point], env=environment, check=True)


def kill_everywhere(point):
    from code_dataset_support import Recipe

    from pipeline.code_dataset import CodeDataset
    from pipeline.code_dataset.verify import verify_code_dataset
    from stages.errors import ArtefactError

    def write(folder, kill_at=None):
        """Exit status of a process that writes the dataset, killed just before or after its `kill_at`-th call."""
        child = os.fork()
        if child == 0:
            arm(point, kill_at)
            Recipe().write(folder)
            os._exit(0)
        return os.waitpid(child, 0)[1]

    def is_sound(folder):
        sound = verify_code_dataset(folder) == []
        return sound and CodeDataset.open(folder, verify=True).root_hash == expected_hash

    def is_half(folder):
        try:
            CodeDataset.open(folder, verify=True)
        except ArtefactError as error:
            return "must be a published code dataset" not in str(error)
        return False

    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None  # a sync costs nothing there; power cuts are not the subject
    with tempfile.TemporaryDirectory(dir=memory) as base:
        Recipe().write(f"{base}/undisturbed")  # here, so that no child has to import anything; writing starts no threads
        expected_hash = in_child(lambda: CodeDataset.open(f"{base}/undisturbed", verify=True).root_hash)
        kill_at, num_kills = 0, 0
        while True:
            folder = f"{base}/{kill_at}"
            status = write(folder, kill_at)
            if status == 0:
                break
            assert os.WTERMSIG(status) == signal.SIGKILL
            assert not in_child(lambda: is_half(folder)), f"a reader saw half a dataset after {point} {kill_at}"
            assert write(folder) == 0
            assert in_child(lambda: is_sound(folder)), f"damage after {point} {kill_at}"
            kill_at, num_kills = kill_at + 1, num_kills + 1
        assert num_kills >= 8, f"{point} was called only {num_kills // 2} times: the test no longer reaches the protocol"


def in_child(function):
    """What a function returns in a forked process, so that this one stays free of threads."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writing, repr(function()).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        text = pipe.read()
    assert os.waitpid(child, 0)[1] == 0
    return ast.literal_eval(text.decode())


def arm(point, kill_at):
    """Makes this process die before (even numbers) or after (odd ones) a call of `os.<point>`."""
    call, num_calls = getattr(os, point), 0

    def deadly(*args, **kwargs):
        nonlocal num_calls
        if kill_at == 2 * num_calls:
            os.kill(os.getpid(), signal.SIGKILL)
        result = call(*args, **kwargs)
        if kill_at == 2 * num_calls + 1:
            os.kill(os.getpid(), signal.SIGKILL)
        num_calls += 1
        return result

    setattr(os, point, deadly)


if __name__ == "__main__":
    kill_everywhere(sys.argv[1])
