import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.order import SampleOrder, permute, rows_digest, slice_for_rank

keys = st.integers(0, 2**64 - 1)


def order(num_images=23, num_views=2, seed=0, global_batch_size=5, root_hash="a"):
    return SampleOrder(
        num_images=num_images,
        num_views=num_views,
        seed=seed,
        global_batch_size=global_batch_size,
        root_hash=root_hash,
    )


orders = st.builds(
    order,
    num_images=st.integers(1, 120),
    num_views=st.integers(1, 4),
    seed=st.integers(0, 2**32),
    global_batch_size=st.integers(1, 64),
    root_hash=st.text(max_size=5),
)


@given(size=st.integers(1, 3000), key=keys)
def test_permute_is_a_bijection(size, key):
    assert sorted(permute(np.arange(size), size, key)) == list(range(size))


@pytest.mark.parametrize("size", [65535, 65536, 65537, 1_281_167])
def test_permute_is_a_bijection_of_large_ranges(size):
    seen = np.zeros(size, bool)
    seen[permute(np.arange(size), size, 7)] = True
    assert seen.all()


def test_permute_takes_ranges_no_array_could_hold():
    size = 10**12
    images = permute(np.arange(1000), size, 7)
    assert len(set(images)) == 1000 and 0 <= images.min() and size // 2 < images.max() < size


def test_a_permutation_looks_random():
    """Neighbours are unrelated, as in a shuffle: 4 standard deviations for 1e5 points."""
    images = permute(np.arange(100_000), 100_000, 3)
    assert abs(np.corrcoef(images[:-1], images[1:])[0, 1]) < 4 / np.sqrt(100_000)
    assert abs(np.corrcoef(images, np.arange(100_000))[0, 1]) < 4 / np.sqrt(100_000)
    assert abs((images[:-1] < images[1:]).mean() - 0.5) < 4 * np.sqrt(1 / 12 / 100_000)


@given(order=orders, epoch=st.integers(0, 3))
def test_every_image_once_per_epoch(order, epoch):
    first = epoch * order.steps_per_epoch
    batches = [order.batch(step) for step in range(first, first + order.steps_per_epoch)]
    images = np.concatenate([batch.rows[batch.valid] for batch in batches]) // order.num_views
    assert sorted(images) == list(range(order.num_images))
    for step, batch in enumerate(batches, start=first):
        assert batch.rows.shape == batch.valid.shape == (order.global_batch_size,)
        assert batch.valid.sum() == order.num_valid(step)
        assert not batch.rows[~batch.valid].any()
        if step < first + order.steps_per_epoch - 1:
            assert batch.valid.all(), "only the last batch of an epoch is masked"


@settings(max_examples=200)
@given(order=orders, world_sizes=st.lists(st.integers(1, 16), min_size=1, max_size=5), first=st.integers(0, 1000))
def test_the_global_batch_is_the_same_for_any_world_size_and_any_cut(order, world_sizes, first):
    """Each step is computed as another world of ranks, none of which has seen a step before."""
    for step, world_size in enumerate(world_sizes, start=first):
        slices = [slice_for_rank(order.global_batch_size, rank, world_size) for rank in range(world_size)]
        batch = order.batch(step)
        rows = np.concatenate([order.batch(step).rows[s] for s in slices])
        np.testing.assert_array_equal(rows, batch.rows)
        positions = np.arange(order.global_batch_size)
        digests = [rows_digest(step, positions[s], batch.rows[s]) for s in slices]
        assert sum(digests) % 2**64 == rows_digest(step, positions, batch.rows)


@given(global_batch_size=st.integers(1, 1000), world_size=st.integers(1, 64))
def test_slices_are_even_and_cover_the_batch(global_batch_size, world_size):
    slices = [slice_for_rank(global_batch_size, rank, world_size) for rank in range(world_size)]
    lengths = [s.stop - s.start for s in slices]
    assert [s.start for s in slices] == [0, *np.cumsum(lengths)[:-1]]
    assert sum(lengths) == global_batch_size and max(lengths) - min(lengths) <= 1


def test_epochs_seeds_and_datasets_have_orders_of_their_own():
    def epoch(order, number=0):
        steps = range(number * order.steps_per_epoch, (number + 1) * order.steps_per_epoch)
        return tuple(np.concatenate([order.batch(step).rows for step in steps]))

    assert len({epoch(order()), epoch(order(), 1), epoch(order(seed=1)), epoch(order(root_hash="b"))}) == 4


def test_an_order_never_changes_between_releases():
    """Runs in progress rest on it: changing it needs another SAMPLER_VERSION."""
    assert order().batch(0).rows.tolist() == [31, 39, 36, 20, 15]
    assert rows_digest(3, np.arange(2), np.array([7, 9])) == 582780049114662315


def test_views_are_chosen_evenly_and_anew_each_epoch():
    many = order(num_images=20_000, num_views=4, global_batch_size=20_000)
    chosen = []
    for epoch in range(2):
        rows = many.batch(epoch).rows
        counts = np.bincount(rows % 4)
        assert abs(counts - 5000).max() < 4 * np.sqrt(20_000 * 3 / 16)
        chosen.append(rows[np.argsort(rows // 4)] % 4)
    assert abs((chosen[0] == chosen[1]).mean() - 0.25) < 4 * np.sqrt(3 / 16 / 20_000)


def test_draws_are_uniform_and_independent_of_the_view():
    many = order(num_images=20_000, num_views=2, global_batch_size=20_000)
    draws, views = many.draws(0), many.batch(0).rows % 2
    assert draws.dtype == np.float64 and 0 <= draws.min() and draws.max() < 1
    assert abs(draws.mean() - 0.5) < 4 / np.sqrt(12 * 20_000)
    assert abs(np.corrcoef(draws, views)[0, 1]) < 4 / np.sqrt(20_000)
    assert abs(np.corrcoef(many.draws(0), many.draws(1))[0, 1]) < 4 / np.sqrt(20_000)


@given(step=st.integers(0, 2**40), seed=st.integers(0, 1000))
def test_a_digest_notices_any_change(step, seed):
    positions, rows = np.arange(20), np.random.default_rng(seed).permutation(1000)[:20]
    digest = rows_digest(step, positions, rows)
    swapped, other = rows.copy(), rows.copy()
    swapped[[3, 7]] = swapped[[7, 3]]
    other[5] += 1
    assert digest not in {
        rows_digest(step + 1, positions, rows),
        rows_digest(step, positions, swapped),
        rows_digest(step, positions, other),
        rows_digest(step, positions[:-1], rows[:-1]),
    }
    shuffled = np.random.default_rng(seed).permutation(20)
    assert rows_digest(step, positions[shuffled], rows[shuffled]) == digest
    assert rows_digest(step, positions[:0], rows[:0]) == 0
