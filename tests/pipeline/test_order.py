import hashlib
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.order import SampleOrder, Window, batch_index, permute, rows_digest, skip_batches, slice_for_rank
from stages.hashing import hash64, uniform

keys = st.integers(0, 2**64 - 1)


def order(num_images=23, num_views=2, seed=0, global_batch_size=5, root_hash="a", window=None):
    return SampleOrder(
        num_images=num_images,
        num_views=num_views,
        seed=seed,
        global_batch_size=global_batch_size,
        root_hash=root_hash,
        window=window,
    )


windows = st.builds(Window, images_per_block=st.integers(1, 12), num_blocks=st.integers(1, 6))
orders = st.builds(
    order,
    num_images=st.integers(1, 80),
    num_views=st.integers(1, 4),
    seed=st.integers(0, 2**32),
    global_batch_size=st.integers(1, 40),
    root_hash=st.text(max_size=5),
    window=st.none() | windows,
)


def images_of_epoch(order, epoch=0):
    steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
    batches = [order.batch(step) for step in steps]
    return np.concatenate([batch.rows[batch.valid] for batch in batches]) // order.num_views


def mixed(value):
    """SplitMix64 in whole numbers."""
    z = (value + 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
    return z ^ z >> 31


def feistel(position, size, key):
    """A network of six rounds over the smallest power of two (at least 4) that holds `size`, walked until inside."""
    bits = max(2, (size - 1).bit_length())
    widths = [bits - bits // 2, bits // 2]
    while True:
        left, right = divmod(position, 2 ** widths[1])
        for round_number in range(6):
            round_key = mixed(mixed(key) ^ round_number)
            left, right = right, left ^ mixed(round_key ^ right) % 2 ** widths[round_number % 2]
        position = left * 2 ** widths[1] + right
        if position < size:
            return position


@given(size=st.integers(1, 3000), key=keys)
def test_permute_is_a_bijection(size, key):
    assert sorted(permute(np.arange(size), size, key)) == list(range(size))


@given(size=st.integers(1, 10**12), key=keys, seed=st.integers(0, 99))
def test_permute_is_a_feistel_network_with_cycle_walking(size, key, seed):
    positions = np.random.default_rng(seed).integers(0, size, 5)
    assert permute(positions, size, key).tolist() == [feistel(position, size, key) for position in positions.tolist()]


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


@settings(max_examples=2000)
@given(order=orders, epoch=st.integers(0, 3))
def test_every_image_once_per_epoch(order, epoch):
    first = epoch * order.steps_per_epoch
    batches = [order.batch(step) for step in range(first, first + order.steps_per_epoch)]
    images = np.concatenate([batch.rows[batch.valid] for batch in batches]) // order.num_views
    assert sorted(images) == list(range(order.num_images))
    for step, batch in enumerate(batches, start=first):
        assert batch.rows.shape == batch.valid.shape == batch.draws.shape == (order.global_batch_size,)
        assert batch.valid.sum() == order.num_valid(step)
        assert not batch.rows[~batch.valid].any()
        if step < first + order.steps_per_epoch - 1:
            assert batch.valid.all(), "only the last batch of an epoch is masked"


@settings(max_examples=2000)
@given(order=orders, world_sizes=st.lists(st.integers(1, 16), min_size=1, max_size=5), first=st.integers(0, 1000))
def test_the_global_batch_is_the_same_for_any_world_size_and_any_cut(order, world_sizes, first):
    """Each step is computed by another world of ranks, which has not seen a step before."""
    for step, world_size in enumerate(world_sizes, start=first):
        batch, restarted = order.batch(step), again(order).batch(step)
        slices = [slice_for_rank(order.global_batch_size, rank, world_size) for rank in range(world_size)]
        for name in ("rows", "valid", "draws"):
            ranks = np.concatenate([getattr(restarted, name)[s] for s in slices])
            assert ranks.tolist() == getattr(batch, name).tolist()


def again(same):
    """An order that is equal, as another process would make it."""
    copy = order(same.num_images, same.num_views, 0, same.global_batch_size, "", same.window)
    copy._key = same._key
    return copy


@given(order=orders, world_size=st.integers(1, 16), step=st.integers(0, 1000))
def test_digests_of_ranks_add_up_to_that_of_the_global_batch(order, world_size, step):
    rows, positions = order.batch(step).rows, np.arange(order.global_batch_size)
    slices = [slice_for_rank(order.global_batch_size, rank, world_size) for rank in range(world_size)]
    digests = [rows_digest(step, positions[s], rows[s]) for s in slices]
    assert sum(digests) % 2**64 == rows_digest(step, positions, rows)


@given(global_batch_size=st.integers(1, 1000), world_size=st.integers(1, 64))
def test_slices_are_even_and_cover_the_batch(global_batch_size, world_size):
    slices = [slice_for_rank(global_batch_size, rank, world_size) for rank in range(world_size)]
    lengths = [s.stop - s.start for s in slices]
    assert [s.start for s in slices] == [0, *np.cumsum(lengths)[:-1]]
    assert sum(lengths) == global_batch_size and max(lengths) - min(lengths) <= 1


@settings(max_examples=500)
@given(num_images=st.integers(1, 200), window=windows, seed=st.integers(0, 99))
def test_a_window_finishes_its_blocks_before_the_next_begins(num_images, window, seed):
    images = images_of_epoch(order(num_images, seed=seed, window=window))
    missing = Counter((np.arange(num_images) // window.images_per_block).tolist())
    opened = set()
    for block in (images // window.images_per_block).tolist():
        opened.add(block)
        assert len(opened) <= window.num_blocks
        missing[block] -= 1
        if not any(missing[block] for block in opened):
            opened.clear()


def test_a_window_mixes_its_blocks_and_blocks_come_in_any_order():
    images = images_of_epoch(order(4096 - 10, global_batch_size=64, window=Window(64, 8)))
    first = images[:400] // 64
    assert len(set(first)) == 8 and (np.diff(first) != 0).mean() > 0.8
    assert np.ptp(first) > 16, "the blocks of a window are not neighbours"
    assert abs(np.corrcoef(images, np.arange(len(images)))[0, 1]) < 0.2


def test_one_window_over_everything_shuffles_everything():
    images = images_of_epoch(order(1000, window=Window(10, 100)))
    assert len(set(images[:200] // 10)) > 80 and sorted(images) == list(range(1000))


@pytest.mark.parametrize("window", [None, Window(4, 2)])
def test_epochs_seeds_and_datasets_have_orders_of_their_own(window):
    base = order(window=window)
    others = [order(seed=1, window=window), order(root_hash="b", window=window)]
    epochs = [images_of_epoch(base), images_of_epoch(base, 1), *map(images_of_epoch, others)]
    assert len(set(map(tuple, epochs))) == 4
    if window:
        blocks = [[block for i, block in enumerate(e // 4) if block not in (e // 4)[:i]] for e in epochs]
        assert len(set(map(tuple, blocks))) == 4, "not only the images of a window, but also the windows differ"


def test_an_order_never_changes_between_releases():
    """Runs in progress rest on it: changing it needs another SAMPLER_VERSION."""
    assert order().batch(0).rows.tolist() == [40, 0, 30, 38, 21]
    assert order(window=Window(4, 2)).batch(1).rows.tolist() == [40, 45, 25, 7, 3]
    assert rows_digest(3, np.arange(2), np.array([7, 9])) == 582780049114662315


def test_views_and_draws_are_hashes_of_key_use_epoch_and_image():
    key = int.from_bytes(hashlib.sha256(b"2:a:5").digest()[:8], "little")
    for window in (None, Window(4, 2)):
        many = order(num_images=50, num_views=3, seed=5, global_batch_size=50, window=window)
        for epoch in range(3):
            batch = many.batch(epoch)
            images = batch.rows // 3
            np.testing.assert_array_equal(batch.rows % 3, hash64(key, 1, epoch, images) % np.uint64(3))
            np.testing.assert_array_equal(batch.draws, uniform(hash64(key, 2, epoch, images)))
        expected = permute(np.arange(50), 50, int(hash64(key, 0, 2)[0]))
        assert window or images.tolist() == expected.tolist()


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
    first, second = many.batch(0), many.batch(1)
    assert first.draws.dtype == np.float64 and 0 <= first.draws.min() and first.draws.max() < 1
    assert abs(first.draws.mean() - 0.5) < 4 / np.sqrt(12 * 20_000)
    assert abs(np.corrcoef(first.draws, first.rows % 2)[0, 1]) < 4 / np.sqrt(20_000)
    by_image = [batch.draws[np.argsort(batch.rows // 2)] for batch in (first, second)]
    assert abs(np.corrcoef(*by_image)[0, 1]) < 4 / np.sqrt(20_000)


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


ranges = st.lists(st.tuples(st.integers(0, 30), st.integers(1, 6)).map(lambda pair: (pair[0], sum(pair))), max_size=6)


@given(ranges)
def test_skipped_batches_are_passed_over_and_no_other(chosen):
    skipped = ()
    for start, stop in chosen:
        skipped = skip_batches(skipped, start, stop)
    left_out = {batch for start, stop in chosen for batch in range(start, stop)}
    kept = [batch for batch in range(100) if batch not in left_out]
    assert [batch_index(step, skipped) for step in range(40)] == kept[:40]
    assert all(stop < start for (_, stop), (start, _) in zip(skipped, skipped[1:]))


def test_what_is_skipped_later_changes_nothing_before():
    skipped = ((3, 5),)
    before = [batch_index(step, skipped) for step in range(6)]
    more = skip_batches(skipped, batch_index(6, skipped), 12)
    assert [batch_index(step, more) for step in range(6)] == before
