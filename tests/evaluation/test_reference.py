import functools
import json

import numpy as np
import pyarrow as pa
import pytest

from evaluation.frechet import Reference, frechet_distance
from evaluation.reference import (
    choose_images,
    images_identity,
    load_reference,
    read_statistics,
    reference_key,
    reference_path,
    statistics_npz,
)
from evaluation.reference import store_reference as store_reference_of
from evaluation.statistics import GaussianStatistics
from stages.errors import ArtefactError
from stages.options import ImageOptions, SourceOptions

store_reference = functools.partial(store_reference_of, extractor_fingerprint="f" * 64)


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
    assert (loaded.sha256, loaded.num_unusable, loaded.reference.gaussian.n) == (stored.sha256, 3, 50)
    other = GaussianStatistics.of(np.random.default_rng(1).normal(size=(40, 8)))
    assert frechet_distance(other, loaded.reference.gaussian) == frechet_distance(other, stored.reference.gaussian) > 0


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


def test_the_key_binds_images_preprocessing_extractor_output_and_kept_features():
    source, images = SourceOptions(), ImageOptions(size=32)

    def key(rows: pa.Table, source=source, images=images, extractor="x", output="features", num_kept=0) -> str:
        return reference_key(images_identity(source, images, rows), extractor, output, num_kept)

    keys = [
        key(listing(10)),
        key(listing(10), extractor="y"),
        key(listing(10), output="spatial"),
        key(listing(10), num_kept=100),
        key(listing(11)),
        key(listing(10, num_bytes=8)),
        key(listing(10), images=ImageOptions(size=64)),
        key(listing(10), source=SourceOptions(seed=1)),
    ]
    assert len(set(keys)) == len(keys)
    assert keys[0] == key(listing(10))
    assert keys[0] == key(listing(10, prefix="b")), "a copy in another place is the same set"


class Extractor8:
    name, fingerprint, outputs = "eight@32", "f" * 64, {"features": 8, "spatial": 6}


def test_files_of_pytorch_fid_and_adm_are_read(tmp_path, statistics):
    spatial = GaussianStatistics.of(np.random.default_rng(3).normal(size=(50, 6)))
    arrays = {"mu": statistics.mean, "sigma": statistics.covariance}
    np.savez(tmp_path / "fid.npz", **arrays)
    np.savez(tmp_path / "adm.npz", **arrays, mu_s=spatial.mean, sigma_s=spatial.covariance, arr_0=np.zeros((2, 4, 4, 3)))
    other = GaussianStatistics.of(np.random.default_rng(1).normal(size=(40, 8)))
    expected = frechet_distance(other, Reference.of(statistics))
    found = [read_statistics(str(tmp_path / name), "features", Extractor8()) for name in ("fid.npz", "adm.npz")]
    for stored in found:
        assert frechet_distance(other, stored.reference.gaussian) == pytest.approx(expected, rel=1e-9)
        assert stored.to_dict()["n"] is None
    assert found[0].key != found[1].key
    assert read_statistics(str(tmp_path / "adm.npz"), "spatial", Extractor8()).reference.gaussian.mean.shape == (6,)
    with pytest.raises(ArtefactError, match="fid.npz, which has no mu_s and sigma_s"):
        read_statistics(str(tmp_path / "fid.npz"), "spatial", Extractor8())


def test_statistics_written_for_others_read_back_and_know_their_extractor(tmp_path, statistics):
    spatial = GaussianStatistics.of(np.random.default_rng(3).normal(size=(50, 6)))
    stored = {
        name: store_reference(str(tmp_path), name * 8, each, num_unusable=0)
        for name, each in (("features", statistics), ("spatial", spatial))
    }
    for name, fingerprint in (("ours.npz", Extractor8.fingerprint), ("theirs.npz", "0" * 64)):
        (tmp_path / name).write_bytes(statistics_npz(stored, {"extractor_fingerprint": fingerprint}))
    with np.load(tmp_path / "ours.npz") as file:
        np.testing.assert_allclose(file["sigma"], statistics.covariance, rtol=1e-12, atol=1e-15)
        np.testing.assert_allclose(file["mu_s"], spatial.mean)
    read = read_statistics(str(tmp_path / "ours.npz"), "features", Extractor8())
    assert read.to_dict()["n"] == 50
    with pytest.raises(ArtefactError, match="theirs.npz, made with the extractor of fingerprint 0{64}"):
        read_statistics(str(tmp_path / "theirs.npz"), "features", Extractor8())


def test_a_reference_of_a_history_knows_its_extractor(tmp_path, statistics):
    for key, fingerprint in (("k" * 64, Extractor8.fingerprint), ("l" * 64, "0" * 64)):
        store_reference_of(str(tmp_path), key, statistics, 0, extractor_fingerprint=fingerprint)
    own, other = (reference_path(str(tmp_path), letter * 64) for letter in "kl")
    assert read_statistics(own, "features", Extractor8()).to_dict()["n"] == 50
    with pytest.raises(ArtefactError, match=f"{other}, made with the extractor of fingerprint 0{{64}}"):
        read_statistics(other, "features", Extractor8())


def test_a_reference_of_an_older_history_which_does_not_name_its_extractor_is_read(tmp_path, statistics):
    key = "k" * 64
    stored = store_reference(str(tmp_path), key, statistics, num_unusable=0)
    path = reference_path(str(tmp_path), key)
    with np.load(path) as file:
        arrays = dict(file)
    meta = json.loads(str(arrays["meta"]))
    del meta["extractor_fingerprint"]
    np.savez(path, **arrays | {"meta": np.array(json.dumps(meta))})
    assert load_reference(str(tmp_path), key).to_dict() == stored.to_dict()
    assert read_statistics(path, "features", Extractor8()).to_dict()["n"] == 50


def test_a_covariance_that_float32_rounded_serves(tmp_path):
    few = GaussianStatistics.of(np.random.default_rng(0).normal(size=(5, 8)) * 10.0 ** np.arange(8))
    sigma = few.covariance.astype(np.float32)
    assert np.linalg.eigvalsh(sigma.astype(np.float64))[0] < 0
    np.savez(tmp_path / "rounded.npz", mu=few.mean, sigma=sigma)
    assert read_statistics(str(tmp_path / "rounded.npz"), "features", Extractor8()).reference.gaussian.factor.shape[1] <= 8


def test_files_that_cannot_serve_are_refused(tmp_path, statistics):
    np.savez(tmp_path / "narrow.npz", mu=np.zeros(3), sigma=np.eye(3))
    (tmp_path / "damaged.npz").write_bytes(b"PK no zip")
    np.save(tmp_path / "mean.npy", np.zeros(8))
    one_below = np.diag([1.0] * 7 + [-5.0])
    for name, sigma in (
        ("nan.npz", np.full((8, 8), np.nan)),
        ("skew.npz", np.triu(np.ones((8, 8)))),
        ("negative.npz", -np.eye(8)),
        ("indefinite.npz", one_below),
    ):
        np.savez(tmp_path / name, mu=np.zeros(8), sigma=sigma)
    for name, message in (
        ("none.npz", "no such file"),
        ("damaged.npz", "cannot be read"),
        ("mean.npy", "cannot be read"),
        ("nan.npz", "sigma is not symmetric or not finite"),
        ("skew.npz", "sigma is not symmetric or not finite"),
        ("negative.npz", "sigma has the eigenvalue -1, so it is no covariance"),
        ("indefinite.npz", "sigma has the eigenvalue -5, so it is no covariance"),
        ("narrow.npz", r"a mean of shape \(3,\), but the metrics need mu \(8,\)"),
    ):
        with pytest.raises(ArtefactError, match=f"evaluation.reference_path is .*{name}.*{message}"):
            read_statistics(str(tmp_path / name), "features", Extractor8())


def test_features_that_are_kept_come_back_and_are_part_of_the_hash(tmp_path, statistics):
    features = np.random.default_rng(0).normal(size=(20, 8)).astype(np.float32)
    kept = np.arange(3, 43, 2)
    stored = store_reference(str(tmp_path), "k" * 64, statistics, 0, features, kept, {"real": 1.0, "damaged": 9.0})
    loaded = load_reference(str(tmp_path), "k" * 64)
    np.testing.assert_array_equal(loaded.reference.features, features)
    np.testing.assert_array_equal(loaded.kept, kept)
    assert loaded.to_dict() == stored.to_dict() and loaded.self_test == {"real": 1.0, "damaged": 9.0}
    others = [
        store_reference(str(tmp_path), "l" * 64, statistics, 0),
        store_reference(str(tmp_path), "m" * 64, statistics, 0, features, kept + 1),
    ]
    assert len({stored.sha256, *(other.sha256 for other in others)}) == 3 and others[0].kept is None
