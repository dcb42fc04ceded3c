"""References made of images that a stub turns into features, without Ray."""

import json

import numpy as np
import pytest

from evaluation.estimates import fair_choice
from evaluation.reference import load_reference, reference_path
from evaluation.reference_features import ReferenceImages, references_of
from stages.errors import TesseraError

FEW, MANY, NONE = ("x", "few"), ("x", "many"), ("x", "none")
NUM_KEPT = {FEW: 12, MANY: 1000, NONE: 0}
WIDTH, ITEM_SIZE = 3, 16


class Actor:
    """An actor whose features of image i are those of a generator seeded with i; images named `bad` cannot be used."""

    def of_reference(self, uris, keys):
        is_usable = np.array(["bad" not in uri for uri in uris])
        found = [features_of(uri) for uri, usable in zip(uris, is_usable) if usable]
        return {key: np.array(found).reshape(-1, WIDTH) for key in keys}, is_usable, {name: f"weights of {name}" for name, _ in keys}

    def of_damaged(self, uris, keys):
        return {key: values + 9.0 for key, values in self.of_reference(uris, keys)[0].items()}


def features_of(uri):
    return np.random.default_rng(int(uri.split("/")[1])).normal(size=WIDTH).astype(np.float32)


def run(num_images, call):
    for start in range(0, num_images, ITEM_SIZE):
        item = (start, min(start + ITEM_SIZE, num_images))
        method, arguments = call(item)
        yield item, getattr(Actor(), method)(*arguments)


def uris_of(num_images, bad=()):
    return [f"{'bad' if i in bad else 'image'}/{i}" for i in range(num_images)]


def test_features_that_are_kept_know_which_listed_images_they_are_of(tmp_path):
    bad = (0, 17, 18, 59)
    images = ReferenceImages(path=str(tmp_path), uris=uris_of(60, bad), num_kept=NUM_KEPT)
    keys = {features: name * 16 for features, name in zip(NUM_KEPT, "abcd")}
    made = references_of(images, keys, dict.fromkeys(NUM_KEPT, WIDTH), run)
    usable = np.setdiff1d(np.arange(60), bad)
    assert made[MANY].kept.tolist() == usable.tolist() and made[MANY].num_unusable == 4
    assert made[FEW].kept.tolist() == [i for i in np.flatnonzero(fair_choice(60, 12)) if i not in bad]
    assert made[NONE].kept is None and made[NONE].reference.features is None
    for features in (FEW, MANY):
        stored = load_reference(str(tmp_path), keys[features])
        assert stored.kept.dtype == np.int64
        expected = [features_of(images.uris[position]) for position in stored.kept]
        np.testing.assert_array_equal(stored.reference.features, expected)


def test_a_reference_names_the_extractor_that_made_it(tmp_path):
    other = ("y", "none")
    images = ReferenceImages(path=str(tmp_path), uris=uris_of(40), num_kept={NONE: 0, other: 0})
    keys = {NONE: "a" * 16, other: "b" * 16}
    references_of(images, keys, dict.fromkeys(keys, WIDTH), run)
    for features, key in keys.items():
        with np.load(reference_path(str(tmp_path), key)) as file:
            assert json.loads(str(file["meta"]))["extractor_fingerprint"] == f"weights of {features[0]}"


def test_a_single_usable_image_makes_no_reference(tmp_path):
    images = ReferenceImages(path=str(tmp_path), uris=uris_of(3, bad=(0, 2)), num_kept={NONE: 0})
    with pytest.raises(TesseraError, match="1 of 3 training images can be used"):
        references_of(images, {NONE: "a" * 16}, {NONE: WIDTH}, run)
