import threading

import numpy as np
import pytest
import torch
from code_dataset_support import Recipe
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.code_dataset import CodeDataset
from pipeline.loader import CodeLoader
from pipeline.order import SampleOrder, rows_digest


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return CodeDataset.open(Recipe(num_images=40).write(tmp_path_factory.mktemp("codes")), verify=True)


def loader(dataset, *, rank=0, world_size=1, micro_batch_size=4, cond_drop_prob=0.0, global_batch_size=10, seed=0):
    order = SampleOrder(
        num_images=dataset.num_images,
        num_views=dataset.num_views,
        seed=seed,
        global_batch_size=global_batch_size,
        root_hash=dataset.root_hash,
    )
    return CodeLoader(
        dataset,
        order,
        rank=rank,
        world_size=world_size,
        micro_batch_size=micro_batch_size,
        cond_drop_prob=cond_drop_prob,
    )


def flat(micro_batches):
    """Codes and labels of the rows that count."""
    valid = torch.cat([batch.valid for batch in micro_batches])
    codes, labels = (torch.cat([getattr(batch, name) for batch in micro_batches])[valid] for name in ("codes", "labels"))
    return codes, labels


def test_micro_batches_are_ready_tensors(dataset):
    batches = loader(dataset).micro_batches(0)
    assert len(batches) == 3
    for batch in batches:
        assert (batch.codes.shape, batch.codes.dtype) == ((4, 6), torch.int64)
        assert (batch.labels.shape, batch.labels.dtype) == ((4,), torch.int64)
        assert (batch.valid.shape, batch.valid.dtype) == ((4,), torch.bool)
    assert sum(int(batch.valid.sum()) for batch in batches) == 10


@settings(max_examples=50)
@given(
    world_size=st.integers(1, 13),
    micro_batch_size=st.integers(1, 12),
    global_batch_size=st.integers(1, 50),
    step=st.integers(0, 40),
)
def test_ranks_together_read_the_global_batch(dataset, world_size, micro_batch_size, global_batch_size, step):
    sizes = {"micro_batch_size": micro_batch_size, "global_batch_size": global_batch_size, "cond_drop_prob": 0.3}
    ranks = [loader(dataset, rank=rank, world_size=world_size, **sizes) for rank in range(world_size)]
    batches = [rank.micro_batches(step) for rank in ranks]
    shapes = {tuple(batch.codes.shape for batch in rank) for rank in batches}
    assert len(shapes) == 1, "every rank must make the same collective calls"
    expected = ranks[0].order.batch(step)
    rows = expected.rows[expected.valid]
    codes, labels = (torch.cat(values) for values in zip(*map(flat, batches)))
    np.testing.assert_array_equal(codes, dataset.codes(rows))
    dropped = ranks[0].order.draws(step)[expected.valid] < 0.3
    np.testing.assert_array_equal(labels, np.where(dropped, -1, dataset.labels(rows)))
    digest = rows_digest(step, np.arange(global_batch_size)[expected.valid], rows)
    assert sum(rank.digest(step) for rank in ranks) % 2**64 == digest


def test_conditions_are_dropped_at_the_given_rate(dataset):
    def dropped(cond_drop_prob):
        reader = loader(dataset, cond_drop_prob=cond_drop_prob, global_batch_size=39)
        labels = torch.cat([flat(reader.micro_batches(step))[1] for step in range(30)])
        return float((labels == -1).float().mean())

    assert dropped(0.0) == 0 and dropped(1.0) == 1
    assert abs(dropped(0.2) - 0.2) < 4 * np.sqrt(0.2 * 0.8 / (30 * 39))


def test_iterating_gives_the_steps_in_order_from_any_start(dataset):
    reader = loader(dataset)
    steps = dict(reader.iterate(3, 9))
    assert list(steps) == list(range(3, 9))
    for step, batches in steps.items():
        torch.testing.assert_close(flat(batches), flat(reader.micro_batches(step)))
    assert list(reader.iterate(5, 5)) == []


def test_the_next_step_is_read_while_the_caller_works(dataset):
    reader = loader(dataset)
    read = {step: threading.Event() for step in range(4)}
    micro_batches = reader.micro_batches
    reader.micro_batches = lambda step: (micro_batches(step), read[step].set())[0]
    iterator = reader.iterate(0, 3)
    next(iterator)
    assert read[1].wait(timeout=30)
    iterator.close()
    assert not any("code-loader" in thread.name for thread in threading.enumerate())


def test_an_error_of_the_reading_thread_reaches_the_caller(dataset):
    reader = loader(dataset)

    def broken(step):
        if step == 2:
            raise OSError("the disk is gone")
        return []

    reader.micro_batches = broken
    seen = []
    with pytest.raises(OSError, match="the disk is gone"):
        for step, _ in reader.iterate(0, 5):
            seen.append(step)
    assert seen == [0, 1]
