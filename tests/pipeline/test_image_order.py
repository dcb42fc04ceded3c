"""The order of training images: every image once per epoch, whatever the batch, the ranks or the place one starts from."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.image_order import ImageOrder, augmentation, list_hash
from pipeline.order import rows_digest, slice_for_rank


def order(num_images=10, batch=4, seed=0, hash_of_list="a"):
    return ImageOrder(list_hash=hash_of_list, num_images=num_images, seed=seed, global_batch_size=batch)


@given(st.integers(1, 60), st.integers(1, 40), st.integers(0, 2**40))
def test_each_image_comes_once_per_epoch_and_no_batch_is_short(num_images, batch, seed):
    count = -(-3 * num_images // batch)
    batches = [order(num_images, batch, seed).batch(i) for i in range(count)]
    assert all(len(b.rows) == len(b.keys) == batch for b in batches)
    rows = np.concatenate([b.rows for b in batches])
    for epoch in range(3):
        assert sorted(rows[epoch * num_images : (epoch + 1) * num_images]) == list(range(num_images))


def test_epochs_differ_in_order_and_augmentation():
    batches = [order(100, 100).batch(i) for i in range(2)]
    assert not np.array_equal(batches[0].rows, batches[1].rows)
    by_row = [dict(zip(b.rows.tolist(), b.keys.tolist())) for b in batches]
    assert all(by_row[0][row] != by_row[1][row] for row in range(100))


@pytest.mark.parametrize("changes", [{"seed": 1}, {"hash_of_list": "b"}])
def test_another_seed_or_list_is_another_order(changes):
    assert not np.array_equal(order(1000, 1000).batch(0).rows, order(1000, 1000, **changes).batch(0).rows)


def test_the_order_of_images_does_not_depend_on_the_batch():
    small, large = order(64, 8), order(64, 16)
    rows = np.concatenate([small.batch(2).rows, small.batch(3).rows])
    assert np.array_equal(rows, large.batch(1).rows)


@given(st.integers(1, 7), st.integers(7, 30))
def test_digests_of_ranks_add_up(world_size, batch):
    rows = order(50, batch).batch(3).rows
    whole = rows_digest(3, np.arange(batch), rows)
    parts = [slice_for_rank(batch, rank, world_size) for rank in range(world_size)]
    assert sum(rows_digest(3, np.arange(batch)[p], rows[p]) for p in parts) % 2**64 == whole


def test_a_substitute_follows_from_the_entry_and_the_attempt():
    o = order(1000)
    assert [o.substitute(5, i) for i in range(9)] == [order(1000).substitute(5, i) for i in range(9)]
    assert len({o.substitute(5, i) for i in range(9)} | {o.substitute(6, i) for i in range(9)}) > 12
    assert all(0 <= o.substitute(key, 0) < 1000 for key in range(200))


@given(
    st.integers(0, 2**64 - 1),
    st.integers(1, 300),
    st.integers(1, 300),
    st.one_of(st.none(), st.floats(0.01, 1.0)),
    st.booleans(),
)
def test_a_crop_is_a_square_of_whole_pixels_inside(key, height, width, min_crop, flips):
    crop = augmentation(key, height, width, min_crop=min_crop, flips=flips)
    assert crop.width == crop.height and all(v == int(v) for v in (crop.left, crop.top, crop.width))
    assert 0 <= crop.left <= width - crop.width and 0 <= crop.top <= height - crop.height
    shorter = min(height, width)
    assert crop.width == shorter if min_crop in (None, 1.0) else crop.width >= max(1, round(shorter * min_crop))
    assert flips or not crop.is_flipped


def test_crops_reach_every_place_and_half_are_mirrored():
    crops = [augmentation(key, 20, 30, min_crop=0.5, flips=True) for key in range(2000)]
    assert {c.width for c in crops} == set(range(10, 21))
    assert min(c.left for c in crops) == 0 and max(c.left + c.width for c in crops) == 30
    assert 0.45 < np.mean([c.is_flipped for c in crops]) < 0.55


def test_the_hash_of_a_list_knows_ids_and_their_order():
    tables = [pa.table({"image_id": pa.array(ids, pa.int64())}) for ids in ([1, 2, 3], [1, 3, 2], [1, 2], [1, 2, 3])]
    hashes = [list_hash(table) for table in tables]
    assert len(set(hashes)) == 3 and hashes[0] == hashes[3]
