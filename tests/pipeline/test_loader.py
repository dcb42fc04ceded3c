import threading

import numpy as np
import pytest
import torch
from code_dataset_support import Recipe, files_of, flip_bit
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.code_dataset import CodeDataset
from pipeline.condition_codes import ConditionCodes
from pipeline.loader import CodeLoader, LoadedStep, dataset_order, open_dataset
from pipeline.order import Window, rows_digest
from stages.errors import ArtefactError
from stages.options import CodesOptions


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return CodeDataset.open(Recipe(num_images=40).write(tmp_path_factory.mktemp("codes")), verify=True)


def loader(
    dataset,
    *,
    rank=0,
    world_size=1,
    micro_batch_size=4,
    cond_drop_prob=0.0,
    global_batch_size=10,
    seed=0,
    window_groups=None,
    conditions=None,
):
    return CodeLoader(
        dataset,
        dataset_order(dataset, seed=seed, global_batch_size=global_batch_size, window_groups=window_groups),
        rank=rank,
        world_size=world_size,
        micro_batch_size=micro_batch_size,
        cond_drop_prob=cond_drop_prob,
        conditions=conditions,
    )


def flat(loaded):
    """Codes and labels of the rows that count."""
    valid = torch.cat([batch.valid for batch in loaded.micro_batches])
    return [torch.cat([getattr(batch, name) for batch in loaded.micro_batches])[valid] for name in ("codes", "labels")]


def test_codes_of_a_condition_take_the_place_of_classes(dataset, tmp_path):
    recipe = Recipe(num_images=40, grid=(2, 2), codebook_size=300)
    conditions = ConditionCodes(CodeDataset.open(recipe.write(tmp_path), verify=True), dataset)
    for drop in (0.0, 0.5):
        loaded = loader(dataset, conditions=conditions, cond_drop_prob=drop).load(3)
        plain = loader(dataset, cond_drop_prob=drop).load(3)
        codes, labels = flat(loaded)
        assert torch.equal(codes, flat(plain)[0]) and loaded.digest == plain.digest
        rows = dataset_order(dataset, seed=0, global_batch_size=10, window_groups=None).batch(3).rows
        expected = torch.from_numpy(conditions.labels(rows[: len(labels)]))
        is_dropped = flat(plain)[1] < 0
        assert torch.equal(labels, torch.where(is_dropped[:, None], -1, expected))
        assert is_dropped.any() == (drop > 0)


def test_micro_batches_are_ready_tensors(dataset):
    loaded = loader(dataset).load(0)
    assert (loaded.step, loaded.num_valid, len(loaded.micro_batches)) == (0, 10, 3)
    for batch in loaded.micro_batches:
        assert (batch.codes.shape, batch.codes.dtype) == ((4, 6), torch.int64)
        assert (batch.labels.shape, batch.labels.dtype) == ((4,), torch.int64)
        assert (batch.valid.shape, batch.valid.dtype) == ((4,), torch.bool)
    assert sum(int(batch.valid.sum()) for batch in loaded.micro_batches) == 10


@settings(max_examples=50)
@given(
    world_size=st.integers(1, 13),
    micro_batch_size=st.integers(1, 12),
    global_batch_size=st.integers(1, 50),
    step=st.integers(0, 40),
    window_groups=st.none() | st.integers(1, 3),
)
def test_ranks_together_read_the_global_batch(
    dataset, world_size, micro_batch_size, global_batch_size, step, window_groups
):
    sizes = {"micro_batch_size": micro_batch_size, "global_batch_size": global_batch_size, "cond_drop_prob": 0.3}
    ranks = [
        loader(dataset, rank=rank, world_size=world_size, window_groups=window_groups, **sizes)
        for rank in range(world_size)
    ]
    loaded = [rank.load(step) for rank in ranks]
    shapes = {tuple(batch.codes.shape for batch in rank.micro_batches) for rank in loaded}
    assert len(shapes) == 1, "every rank must make the same collective calls"
    expected = ranks[0].order.batch(step)
    rows = expected.rows[expected.valid]
    codes, labels = (torch.cat(values) for values in zip(*map(flat, loaded)))
    np.testing.assert_array_equal(codes, dataset.codes(rows))
    dropped = expected.draws[expected.valid] < 0.3
    np.testing.assert_array_equal(labels, np.where(dropped, -1, dataset.labels(rows)))
    digest = rows_digest(step, np.arange(global_batch_size)[expected.valid], rows)
    assert sum(rank.digest for rank in loaded) % 2**64 == digest
    assert {rank.num_valid for rank in loaded} == {len(rows)}


def test_conditions_are_dropped_at_the_given_rate(dataset):
    def dropped(cond_drop_prob):
        reader = loader(dataset, cond_drop_prob=cond_drop_prob, global_batch_size=39)
        labels = torch.cat([flat(reader.load(step))[1] for step in range(30)])
        return float((labels == -1).float().mean())

    assert dropped(0.0) == 0 and dropped(1.0) == 1
    assert abs(dropped(0.2) - 0.2) < 4 * np.sqrt(0.2 * 0.8 / (30 * 39))


def test_iterating_gives_the_steps_in_order_from_any_start(dataset):
    reader = loader(dataset)
    steps = list(reader.iterate(3, 9))
    assert [loaded.step for loaded in steps] == list(range(3, 9))
    for loaded in steps:
        alone = reader.load(loaded.step)
        torch.testing.assert_close(flat(loaded), flat(alone))
        assert (loaded.digest, loaded.num_valid) == (alone.digest, alone.num_valid)
    assert list(reader.iterate(5, 5)) == []


def test_the_next_step_is_read_while_the_caller_works(dataset):
    reader = loader(dataset)
    read, load = {step: threading.Event() for step in range(4)}, reader.load
    reader.load = lambda step, skipped: (load(step), read[step].set())[0]
    iterator = reader.iterate(0, 3)
    next(iterator)
    assert read[1].wait(timeout=30)
    iterator.close()
    assert not any("code-loader" in thread.name for thread in threading.enumerate())


def test_an_error_of_the_reading_thread_reaches_the_caller(dataset):
    reader = loader(dataset)

    def broken(step, skipped):
        if step == 2:
            raise OSError("the disk is gone")
        return LoadedStep(step, step, [], 0, 0)

    reader.load = broken
    seen = []
    with pytest.raises(OSError, match="the disk is gone"):
        for loaded in reader.iterate(0, 5):
            seen.append(loaded.step)
    assert seen == [0, 1]


def test_settling_finds_damage_of_what_was_read(tmp_path):
    root = Recipe(row_group_rows=4).write(tmp_path)
    reader = loader(CodeDataset.open(root, verify=False), micro_batch_size=19, global_batch_size=19)
    group = reader.dataset.manifest["parts"][0]["row_groups"][6]["columns"]["codes"]
    flip_bit(files_of(root, "data")[0], 8 * group["offset"] + 11)
    reader.load(0)
    for _ in range(2):
        with pytest.raises(ArtefactError, match="is damaged"):
            reader.settle()
    with pytest.raises(ArtefactError, match="is damaged"):
        reader.load(1)


def test_a_window_reaches_over_so_many_row_groups(tmp_path):
    dataset = CodeDataset.open(Recipe(row_group_rows=4, bad_images=()).write(tmp_path), verify=False)
    order = dataset_order(dataset, seed=0, global_batch_size=6, window_groups=3)
    assert order.window == Window(images_per_block=2, num_blocks=3)
    assert len(set(order.batch(0).rows // 4)) == 3
    assert dataset_order(dataset, seed=0, global_batch_size=6, window_groups=None).window is None


def test_row_groups_on_s3_are_fetched_before_their_step(s3, tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.loader.FETCH_AHEAD_STEPS", 2)
    root = Recipe(row_group_rows=4).write(s3)
    options = CodesOptions(path=root, cache_path=str(tmp_path / "cache"))
    reader = loader(open_dataset(options, verify=False), global_batch_size=4)
    asked, prefetch = [], reader.dataset.prefetch
    reader.dataset.prefetch = lambda rows: (asked.append(rows.tolist()), prefetch(rows))[0]
    steps = list(reader.iterate(0, 5))
    local = loader(
        CodeDataset.open(Recipe(row_group_rows=4).write(tmp_path / "local"), verify=True), global_batch_size=4
    )
    for loaded in steps:
        torch.testing.assert_close(flat(loaded), flat(local.load(loaded.step)))
    assert asked == [reader.order.batch(step).rows.tolist() for step in (2, 3, 4)]


def test_a_configuration_says_where_and_how_to_read(tmp_path):
    root = Recipe().write(tmp_path)
    assert open_dataset(CodesOptions(path=root), verify=True).num_rows == 38
    flip_bit(files_of(root, "plans")[0], 100)
    assert open_dataset(CodesOptions(path=root), verify=False).num_rows == 38
    with pytest.raises(ArtefactError, match="is damaged"):
        open_dataset(CodesOptions(path=root), verify=True)
