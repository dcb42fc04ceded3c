import numpy as np
import pyarrow as pa
import pytest

from evaluation.frechet import frechet_distance
from evaluation.reference import (
    choose_images,
    images_identity,
    load_reference,
    reference_key,
    reference_path,
    store_reference,
)
from evaluation.statistics import GaussianStatistics
from stages.errors import ArtefactError
from stages.options import ImageOptions, SourceOptions


def listing(n: int, prefix: str = "a", num_bytes: int | None = 7) -> pa.Table:
    return pa.table(
        {
            "image_id": pa.array(range(n), pa.int64()),
            "uri": [f"{prefix}/{i}" for i in range(n)],
            "label": pa.array([i * 10 // n for i in range(n)], pa.int32()),
            "num_bytes": pa.array([num_bytes] * n, pa.int64()),
            "etag": pa.array([None] * n, pa.string()),
        }
    )


@pytest.fixture
def statistics() -> GaussianStatistics:
    return GaussianStatistics.of(np.random.default_rng(0).normal(size=(50, 8)) + 1.0)


def test_a_stored_reference_measures_the_same(tmp_path, statistics):
    assert load_reference(str(tmp_path), "k" * 64) is None
    stored = store_reference(str(tmp_path), "k" * 64, statistics, num_unusable=3)
    loaded = load_reference(str(tmp_path), "k" * 64)
    assert (loaded.sha256, loaded.num_unusable, loaded.reference.statistics.n) == (stored.sha256, 3, 50)
    other = GaussianStatistics.of(np.random.default_rng(1).normal(size=(40, 8)))
    assert frechet_distance(other, loaded.reference) == frechet_distance(other, stored.reference) > 0


def test_the_first_reference_of_a_key_stays(tmp_path, statistics):
    stored = store_reference(str(tmp_path), "k" * 64, statistics, num_unusable=0)
    again = store_reference(str(tmp_path), "k" * 64, GaussianStatistics.of(np.eye(8)), num_unusable=1)
    assert again.sha256 == stored.sha256 and again.num_unusable == 0


def test_pytorch_fid_readers_find_mu_and_sigma(tmp_path, statistics):
    store_reference(str(tmp_path), "k" * 64, statistics, num_unusable=0)
    with np.load(reference_path(str(tmp_path), "k" * 64)) as file:
        np.testing.assert_array_equal(file["mu"], statistics.mean)
        np.testing.assert_allclose(file["sigma"], statistics.covariance)
        np.testing.assert_allclose(file["factor"] @ file["factor"].T, statistics.covariance, atol=1e-12)


@pytest.mark.parametrize("damage", ["truncated", "empty", "other key", "flipped byte"])
def test_a_damaged_reference_is_refused(tmp_path, statistics, damage):
    key = "k" * 64
    store_reference(str(tmp_path), key, statistics, num_unusable=0)
    path = tmp_path / "reference" / f"{key[:16]}.npz"
    data = bytearray(path.read_bytes())
    if damage == "flipped byte":
        data[data.index(statistics.mean.tobytes())] ^= 1
    path.write_bytes({"truncated": data[:-100], "empty": b"", "other key": data, "flipped byte": data}[damage])
    wanted = "k" * 16 + "l" * 48 if damage == "other key" else key
    with pytest.raises(ArtefactError, match="computed again"):
        load_reference(str(tmp_path), wanted)


def test_a_choice_from_a_listing_sorted_by_class_has_every_class():
    chosen = choose_images(listing(1000), 100)
    assert chosen.num_rows == 100
    assert np.bincount(chosen["label"].to_numpy(), minlength=10).min() >= 2
    ids = chosen["image_id"].to_pylist()
    assert ids == sorted(ids) and chosen.equals(choose_images(listing(1000), 100))
    assert choose_images(listing(10), 10).num_rows == choose_images(listing(10), None).num_rows == 10


def test_the_key_binds_images_preprocessing_and_extractor():
    source, images = SourceOptions(), ImageOptions(size=32)
    keys = [
        reference_key(images_identity(source, images, listing(10)), "x"),
        reference_key(images_identity(source, images, listing(10)), "y"),
        reference_key(images_identity(source, images, listing(11)), "x"),
        reference_key(images_identity(source, images, listing(10, prefix="b")), "x"),
        reference_key(images_identity(source, images, listing(10, num_bytes=8)), "x"),
        reference_key(images_identity(source, ImageOptions(size=64), listing(10)), "x"),
        reference_key(images_identity(SourceOptions(seed=1), images, listing(10)), "x"),
    ]
    assert len(set(keys)) == len(keys)
    assert keys[0] == reference_key(images_identity(source, images, listing(10)), "x")
