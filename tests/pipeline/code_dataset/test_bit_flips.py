"""Random bit flips in every kind of file of a dataset: `verify` and the reader find each one."""

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from code_dataset_support import Recipe

from pipeline import storage
from pipeline.code_dataset import CodeDataset
from pipeline.code_dataset.garbage import collect_garbage
from pipeline.code_dataset.layout import canonical_json, probe_path, sha256_hex
from pipeline.code_dataset.manifest import read_version
from pipeline.code_dataset.parts import CODES, LABEL
from pipeline.code_dataset.verify import verify_code_dataset
from pipeline.loader import CodeLoader, dataset_order
from stages.errors import ArtefactError

KINDS = ("versions", "manifests", "plans", "receipts", "data", "quarantine", "duplicates")
NUM_FLIPS = 2000
NUM_PAYLOAD_FLIPS = 300
PROBE = canonical_json({"codes": [[1, 2, 3, 4]], "min_agreement": 0.99})


@dataclass(frozen=True, kw_only=True)
class ProbedRecipe(Recipe):
    @property
    def description(self):
        return {**super().description, "probe": {"file_sha256": sha256_hex(PROBE)}}


@pytest.fixture(scope="module")
def root():
    """A dataset with every kind of file, in memory."""
    recipe = ProbedRecipe(
        conditions=("depth",), row_group_rows=8, duplicate_of=((9, 2),), remap_unused=True, used_codes=(1, 4, 5, 9)
    )
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        storage.put_if_absent(probe_path(folder, recipe.plan.fingerprint), PROBE)
        recipe.write(folder)
        collect_garbage(folder)
        yield folder


def flip(path, bit):
    with open(path, "r+b") as file:
        file.seek(bit // 8)
        (byte,) = file.read(1)
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))


def is_refused(function):
    try:
        function()
    except ArtefactError:
        return True
    return False


def files_of(root, kind):
    return storage.list_files(storage.join(root, kind))


def test_verify_and_the_reader_find_every_flipped_bit(root):
    random = np.random.default_rng(0)
    silent = []
    for number in range(NUM_FLIPS):
        path = random.choice(files_of(root, KINDS[number % len(KINDS)]))
        bit = int(random.integers(8 * os.path.getsize(path)))
        flip(path, bit)
        if not verify_code_dataset(root) or not is_refused(lambda: CodeDataset.open(root, verify=True)):
            silent.append((path, bit))
        flip(path, bit)
    assert silent == []
    assert verify_code_dataset(root) == []


def test_every_kind_of_file_is_flipped(root):
    assert {Path(path).relative_to(root).parts[0] for path in storage.list_files(root)} == set(KINDS)
    assert any(path.endswith("probe.json") for path in files_of(root, "plans"))


def test_every_bit_of_a_version_file_counts(tmp_path, monkeypatch):
    """Also the last digit of a time, which may stand for the same number as its neighbour."""
    monkeypatch.setattr("time.time", lambda: 1785329097.3701744)
    assert 1785329097.3701744 == 1785329097.3701745
    root = Recipe().write(tmp_path)
    (path,) = files_of(root, "versions")
    for bit in range(8 * os.path.getsize(path)):
        flip(path, bit)
        assert is_refused(lambda: read_version(root)), bit
        flip(path, bit)


@pytest.mark.parametrize("column", [CODES, LABEL])
def test_the_loader_finds_every_flipped_bit_that_it_reads(root, column):
    for path, bit in payload_flips(root, column):
        flip(path, bit)
        assert is_refused(lambda: read_epoch(root)), (path, bit)
        flip(path, bit)
    read_epoch(root)


def test_flipped_bits_of_condition_maps_are_found(root):
    for path, bit in payload_flips(root, "depth"):
        flip(path, bit)
        assert is_refused(lambda: read_condition(root)), (path, bit)
        flip(path, bit)
    read_condition(root)


def payload_flips(root, column):
    """Random bits among the values of a column."""
    random = np.random.default_rng(1)
    parts = CodeDataset.open(root, verify=True).manifest["parts"]
    chunks = [(part["path"], group["columns"][column]) for part in parts for group in part["row_groups"]]
    for _ in range(NUM_PAYLOAD_FLIPS):
        path, chunk = chunks[random.integers(len(chunks))]
        yield storage.join(root, path), 8 * chunk["offset"] + int(random.integers(8 * chunk["bytes"]))


def read_epoch(root):
    dataset = CodeDataset.open(root, verify=False)
    order = dataset_order(dataset, seed=0, global_batch_size=10, window_groups=None)
    loader = CodeLoader(dataset, order, rank=0, world_size=1, micro_batch_size=5, cond_drop_prob=0.0)
    for _ in loader.iterate(0, -(-dataset.num_rows // 10)):
        pass
    loader.settle()


def read_condition(root):
    dataset = CodeDataset.open(root, verify=False)
    dataset.condition("depth", np.arange(dataset.num_rows), wait=False)
    dataset.settle()
