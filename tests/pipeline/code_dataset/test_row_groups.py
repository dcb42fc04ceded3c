"""Row groups without a dataset: ten groups of one file, read back from the addresses that a reader gets."""

import ctypes
import errno
import os
import threading
from pathlib import Path

import numpy as np
import pytest
import xxhash

from pipeline import storage
from pipeline.code_dataset import row_groups
from pipeline.code_dataset.row_groups import CachedRowGroups, Extent, LocalRowGroups
from stages.errors import ArtefactError, StorageError

NUM_GROUPS, SIZE = 10, 40
CACHED_SIZE = SIZE + 16  # with the bytes that a kernel may look past the end


@pytest.fixture
def values():
    return np.random.default_rng(0).integers(0, 256, (NUM_GROUPS, SIZE)).astype(np.uint8)


@pytest.fixture
def extents(values, tmp_path):
    path = tmp_path / "part"
    path.write_bytes(bytes(100) + values.tobytes() + bytes(100))
    hashes = [xxhash.xxh3_64_hexdigest(group) for group in values]
    return [Extent(str(path), 100 + i * SIZE, SIZE, digest) for i, digest in enumerate(hashes)]


@pytest.fixture
def fetched(monkeypatch):
    """Numbers of the groups that were read from storage."""
    numbers, read_range = [], storage.read_range

    def counting(path, start, length):
        assert length == SIZE
        numbers.append((start - 100) // SIZE)
        return read_range(path, start, length)

    monkeypatch.setattr(storage, "read_range", counting)
    return numbers


def cached(extents, folder, max_bytes=1 << 20):
    return CachedRowGroups(NUM_GROUPS, extents.__getitem__, str(folder), max_bytes)


def contents(column, group):
    return np.frombuffer(ctypes.string_at(int(column.addresses[group]), SIZE), np.uint8)


def damage(path, position):
    data = bytearray(open(path, "rb").read())
    data[position] ^= 4
    with open(path, "wb") as file:
        file.write(data)


def test_local_groups_are_mapped(extents, values):
    column = LocalRowGroups(NUM_GROUPS, extents.__getitem__)
    column.require(np.array([7, 2, 7]), 0)
    for group in (2, 7):
        np.testing.assert_array_equal(contents(column, group), values[group])
    assert np.flatnonzero(column.addresses).tolist() == [2, 7]
    column.settle()


def test_a_damaged_local_group_is_found_when_it_is_touched_and_ever_after(extents):
    damage(extents[3].path, extents[3].offset + 5)
    column = LocalRowGroups(NUM_GROUPS, extents.__getitem__)
    column.require(np.array([0, 1, 2]), 0)
    column.settle()
    column.require(np.array([3]), 0)
    message = f"{extents[3].path} is damaged: bytes 220 to 260 have xxh3_64 .*{extents[3].xxh3_64}"
    for _ in range(2):
        with pytest.raises(ArtefactError, match=message):
            column.settle()
        with pytest.raises(ArtefactError, match=message):
            column.require(np.array([0]), 0)


def test_settling_waits_for_the_check_that_is_running(extents, monkeypatch):
    """Also for one that begins while the checks before it are waited for."""
    damage(extents[3].path, extents[3].offset)
    column, may_check, check = LocalRowGroups(NUM_GROUPS, extents.__getitem__), threading.Event(), Extent.check
    monkeypatch.setattr(Extent, "check", lambda self, data: may_check.wait(30) and check(self, data))
    column.require(np.array([0]), 0)
    waiting = threading.Thread(target=column.settle)
    waiting.start()
    column.require(np.array([3]), 0)
    may_check.set()
    waiting.join()
    with pytest.raises(ArtefactError, match="is damaged"):
        column.settle()


def test_only_what_is_asked_for_is_fetched_and_only_once(extents, values, tmp_path, fetched):
    column = cached(extents, tmp_path / "cache")
    column.require(np.array([4, 1, 4]), 0)
    column.require(np.array([1, 6]), 0)
    assert sorted(fetched) == [1, 4, 6]
    for group in (1, 4, 6):
        np.testing.assert_array_equal(contents(column, group), values[group])


def test_another_process_uses_the_files_that_are_there(extents, values, tmp_path, fetched):
    cached(extents, tmp_path / "cache").require(np.arange(4), 0)
    column = cached(extents, tmp_path / "cache")
    column.require(np.arange(5), 0)
    assert sorted(fetched) == [0, 1, 2, 3, 4]
    np.testing.assert_array_equal(contents(column, 3), values[3])


def test_files_of_another_dataset_are_not_mistaken_for_these(extents, values, tmp_path, fetched):
    cached(extents, tmp_path / "cache").require(np.array([0]), 0)
    other = tmp_path / "other"
    other.write_bytes(bytes(100) + values[::-1].tobytes())
    moved = [Extent(str(other), e.offset, SIZE, x.xxh3_64) for e, x in zip(extents, extents[::-1])]
    column = cached(moved, tmp_path / "cache")
    column.require(np.array([0]), 0)
    np.testing.assert_array_equal(contents(column, 0), values[-1])
    cached(extents, tmp_path / "cache").require(np.array([0]), 0)
    assert len(fetched) == 2, "both are kept"


@pytest.mark.parametrize("change", [lambda path: damage(path, 3), lambda path: os.truncate(path, SIZE - 1)])
def test_a_damaged_cache_file_is_fetched_anew(extents, values, tmp_path, fetched, change):
    cached(extents, tmp_path / "cache").require(np.array([0]), 0)
    (file,) = (tmp_path / "cache").iterdir()
    change(file)
    column = cached(extents, tmp_path / "cache")
    column.require(np.array([0]), 0)
    assert fetched == [0, 0]
    np.testing.assert_array_equal(contents(column, 0), values[0])


def test_a_damaged_part_is_refused_and_not_kept(extents, values, tmp_path):
    damage(extents[3].path, extents[3].offset + 5)
    column = cached(extents, tmp_path / "cache")
    with pytest.raises(ArtefactError, match=f"{extents[3].path} is damaged"):
        column.require(np.array([2, 3]), 0)
    damage(extents[3].path, extents[3].offset + 5)  # as it was
    column.require(np.array([2, 3]), 0)
    np.testing.assert_array_equal(contents(column, 3), values[3])


def test_a_failed_fetch_is_tried_again(extents, values, tmp_path, monkeypatch):
    column, read_range = cached(extents, tmp_path / "cache"), storage.read_range
    faults = [TimeoutError("no answer")]

    def flaky(*range):
        if faults:
            raise faults.pop()
        return read_range(*range)

    monkeypatch.setattr(storage, "read_range", flaky)
    with pytest.raises(TimeoutError, match="no answer"):
        column.require(np.array([5]), 0)
    column.require(np.array([5]), 0)
    np.testing.assert_array_equal(contents(column, 5), values[5])


def test_a_missing_part_is_named(extents, tmp_path):
    os.unlink(extents[0].path)
    with pytest.raises(ArtefactError, match=f"{extents[0].path} is missing"):
        cached(extents, tmp_path / "cache").require(np.array([0]), 0)


def test_the_groups_used_longest_ago_make_room(extents, values, tmp_path, fetched):
    folder = tmp_path / "cache"
    column = cached(extents, folder, max_bytes=3 * CACHED_SIZE)
    for group in (0, 1, 2, 0, 3):
        column.require(np.array([group]), 0)
        np.testing.assert_array_equal(contents(column, group), values[group])
    assert np.flatnonzero(column.addresses).tolist() == [0, 2, 3]
    assert len(list(folder.iterdir())) == 3
    column.require(np.array([1]), 0)
    np.testing.assert_array_equal(contents(column, 1), values[1])
    assert fetched == [0, 1, 2, 3, 1]


def test_what_is_asked_for_at_once_stays_even_if_it_is_too_much(extents, values, tmp_path):
    folder = tmp_path / "cache"
    column = cached(extents, folder, max_bytes=3 * CACHED_SIZE)
    column.require(np.arange(8), 0)
    for group in range(8):
        np.testing.assert_array_equal(contents(column, group), values[group])
    column.require(np.array([9]), 0)
    assert np.flatnonzero(column.addresses).tolist() == [6, 7, 9]
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 3 * CACHED_SIZE


def test_random_reads_with_little_room_are_right(extents, values, tmp_path):
    column, random = cached(extents, tmp_path / "cache", max_bytes=4 * CACHED_SIZE), np.random.default_rng(1)
    for _ in range(100):
        groups = random.integers(0, NUM_GROUPS, 3)
        column.prefetch(random.integers(0, NUM_GROUPS, 2).tolist())
        column.require(groups, 0)
        for group in groups:
            np.testing.assert_array_equal(contents(column, group), values[group])
    assert np.count_nonzero(column.addresses) <= 4


def test_prefetched_groups_are_there_when_they_are_required(extents, values, tmp_path, monkeypatch):
    column, read_range = cached(extents, tmp_path / "cache"), storage.read_range
    numbers, all_fetched = [], threading.Barrier(3)

    def together(path, start, length):
        numbers.append((start - 100) // SIZE)
        all_fetched.wait(timeout=30)  # needs both requests on their way at a time
        return read_range(path, start, length)

    monkeypatch.setattr(storage, "read_range", together)
    column.prefetch([3, 8, 3])
    all_fetched.wait(timeout=30)
    assert not column.addresses.any()
    column.require(np.array([3, 8]), 0)
    assert sorted(numbers) == [3, 8]
    np.testing.assert_array_equal(contents(column, 8), values[8])


def test_groups_that_were_fetched_ahead_in_vain_count_too(extents, values, tmp_path):
    column = cached(extents, tmp_path / "cache", max_bytes=2 * CACHED_SIZE)
    for group in range(0, NUM_GROUPS - 1, 2):
        column.prefetch([group])
        column._ahead[group].result()
        column.require(np.array([group + 1]), 0)
    assert np.count_nonzero(column.addresses) == len(list((tmp_path / "cache").iterdir())) == 2


def test_a_group_that_could_not_be_read_is_asked_for_again(extents, values, tmp_path, monkeypatch):
    column, read_range = cached(extents, tmp_path / "cache"), storage.read_range

    def fail(*where):
        raise StorageError("path is s3://b, but the store cannot be reached")

    monkeypatch.setattr(storage, "read_range", fail)
    with pytest.raises(StorageError):
        column.require(np.array([3]), 0)
    monkeypatch.setattr(storage, "read_range", read_range)
    column.require(np.array([3]), 0)
    np.testing.assert_array_equal(contents(column, 3), values[3])


def test_a_prefetched_group_that_another_process_removed_is_fetched_anew(extents, values, tmp_path, fetched):
    column, other = (cached(extents, tmp_path / "cache", max_bytes=CACHED_SIZE) for _ in range(2))
    other.require(np.array([0]), 0)
    column.prefetch([0])
    column._ahead[0].result()
    other.require(np.array([1]), 0)
    column.require(np.array([0]), 0)
    np.testing.assert_array_equal(contents(column, 0), values[0])


def test_a_group_whose_file_another_process_removes_at_once_is_read_all_the_same(extents, values, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "replace", lambda temporary, file: os.unlink(temporary))
    column = cached(extents, tmp_path / "cache")
    column.require(np.array([0, 3]), 0)
    for group in (0, 3):
        np.testing.assert_array_equal(contents(column, group), values[group])


def test_files_of_earlier_processes_count_and_the_oldest_go_first(extents, values, tmp_path, fetched):
    folder = tmp_path / "cache"
    for start in (0, 3, 6):
        column = cached(extents, folder, max_bytes=4 * CACHED_SIZE)
        for group in range(start, start + 4):
            column.require(np.array([group]), 0)
            os.utime(column._file(group), (group, group))
        assert len(list(folder.iterdir())) == 4
    assert fetched == list(range(NUM_GROUPS)), "the last of each process was there for the next"
    column = cached(extents, folder, max_bytes=2 * CACHED_SIZE)
    assert {str(path) for path in folder.iterdir()} == {column._file(group) for group in (8, 9)}


def test_what_a_dead_process_left_half_written_goes_when_it_is_old(extents, tmp_path):
    folder = tmp_path / "cache"
    file = cached(extents, folder)._file(0)
    old, new = (Path(f"{file}.{name}") for name in ("old", "new"))
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (1000, 1000))
    cached(extents, folder)
    assert list(folder.iterdir()) == [new]


def fill_disk(monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", fail)


def test_groups_are_read_although_the_disk_is_full(extents, values, tmp_path, fetched, monkeypatch, caplog):
    fill_disk(monkeypatch)
    column = cached(extents, tmp_path / "cache")
    for groups in ([0, 3], [3, 5]):
        column.require(np.array(groups), 0)
    for group in (0, 3, 5):
        np.testing.assert_array_equal(contents(column, group), values[group])
    assert sorted(fetched) == [0, 3, 5] and list((tmp_path / "cache").iterdir()) == []
    (warning,) = [record.getMessage() for record in caplog.records]
    assert warning.startswith(f"codes.cache_path is {tmp_path}/cache, but row groups cannot be written there (No space left on device)")


def test_few_groups_stay_in_memory_while_the_disk_is_full(extents, values, tmp_path, monkeypatch):
    fill_disk(monkeypatch)
    monkeypatch.setattr(row_groups, "MEMORY_BYTES", 3 * CACHED_SIZE)
    column = cached(extents, tmp_path / "cache")
    for group in range(6):
        column.require(np.array([group]), 0)
    assert np.flatnonzero(column.addresses).tolist() == [3, 4, 5]
    column.require(np.arange(4), 0)
    for group in range(4):
        np.testing.assert_array_equal(contents(column, group), values[group])


def test_groups_are_kept_again_once_there_is_room(extents, tmp_path, fetched, monkeypatch):
    monkeypatch.setattr(row_groups, "MEMORY_BYTES", 0)
    column = cached(extents, tmp_path / "cache")
    with monkeypatch.context() as context:
        fill_disk(context)
        for group in (0, 1):
            column.require(np.array([group]), 0)
    for group in (2, 0, 2):
        column.require(np.array([group]), 0)
    assert fetched == [0, 1, 2, 0] and {str(path) for path in (tmp_path / "cache").iterdir()} == {column._file(0), column._file(2)}
