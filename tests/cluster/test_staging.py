"""Folders for files on their way: theirs who live, and gone with who died."""

import multiprocessing
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time

import pytest

from cluster import staging
from cluster.staging import Staging, memory_has_room, remove_abandoned


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    memory, disk = tmp_path / "memory", tmp_path / "disk"
    memory.mkdir()
    disk.mkdir()
    monkeypatch.setattr(staging, "MEMORY", str(memory))
    monkeypatch.setattr(tempfile, "tempdir", str(disk))
    return memory, disk


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_folder_is_where_it_was_asked_for_and_gone_after(in_memory, folders):
    folder = Staging(in_memory)
    assert os.path.dirname(folder.path) == str(folders[0 if in_memory else 1])
    with open(os.path.join(folder.path, "file"), "w") as file:
        file.write("content")
    folder.close()
    assert not os.path.exists(folder.path)


def test_what_a_killed_process_left_is_removed_and_nothing_else(folders):
    code = f"import sys; sys.path.insert(0, {os.getcwd()!r}); from cluster import staging; staging.MEMORY = {str(folders[0])!r}; "
    code += "folder = staging.Staging(True); print(folder.path, flush=True); import time; time.sleep(600)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    left = process.stdout.readline().strip()
    ours, foreign = Staging(False), folders[0] / "another-program"
    foreign.mkdir()
    old = time.time() - 2 * staging.ABANDONED_SECONDS
    for path in (left, ours.path, foreign):
        os.utime(path, (old, old))
    remove_abandoned()
    assert os.path.exists(left), "its process lives"
    process.send_signal(signal.SIGKILL)
    process.wait()
    os.utime(left, (time.time(), time.time()))
    remove_abandoned()
    assert os.path.exists(left), "it may be so new that it is not locked yet"
    os.utime(left, (old, old))
    remove_abandoned()
    assert not os.path.exists(left) and os.path.exists(ours.path) and foreign.exists()


def make_abandoned(folder, number):
    path = folder / f"{staging.PREFIX}{number}"
    path.mkdir(mode=0o700)
    old = time.time() - 2 * staging.ABANDONED_SECONDS
    os.utime(path, (old, old))


def remove_together(start):
    start.wait()
    remove_abandoned()


def remove_as_nobody(folder):
    os.setuid(65534)
    assert len(os.listdir(folder)) == 1, "nobody sees it"
    remove_abandoned()


def test_processes_that_remove_the_same_folders_do_not_disturb_each_other(folders):
    for number in range(200):
        make_abandoned(folders[0], number)
    context = multiprocessing.get_context("fork")
    start = context.Barrier(8)
    processes = [context.Process(target=remove_together, args=(start,)) for _ in range(8)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 8
    assert os.listdir(folders[0]) == []


@pytest.mark.skipif(os.getuid() != 0, reason="only root can be another user")
def test_folders_of_another_user_are_left_to_them(monkeypatch):
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # whose parents everybody may enter
        os.chmod(folder, 0o777)
        monkeypatch.setattr(staging, "MEMORY", folder)
        make_abandoned(pathlib.Path(folder), 0)
        process = multiprocessing.get_context("fork").Process(target=remove_as_nobody, args=(folder,))
        process.start()
        process.join()
        assert process.exitcode == 0 and len(os.listdir(folder)) == 1


def test_room_is_what_is_free_in_memory(monkeypatch):
    assert memory_has_room(1 << 10)
    assert not memory_has_room(1 << 60)
    monkeypatch.setattr(staging, "MEMORY", "/no/such/folder")
    assert not memory_has_room(1 << 10)
