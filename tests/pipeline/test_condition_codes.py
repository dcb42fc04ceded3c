"""Codes of a condition beside those of images: by image and view, whatever else either dataset holds; refused where one is missing."""

import dataclasses

import numpy as np
import pytest
from code_dataset_support import Recipe, flip_bit

from pipeline import storage
from pipeline.code_dataset import CodeDataset
from pipeline.condition_codes import ConditionCodes, find_images
from pipeline.loader import open_conditions
from stages.errors import ArtefactError, ConfigError
from stages.options import CodesOptions

IMAGES = Recipe(num_images=40, bad_images=(5, 17))
CONDITIONS = Recipe(num_images=48, bad_images=(5,), grid=(2, 2), codebook_size=300, row_group_rows=16)


def opened(recipe, folder):
    return CodeDataset.open(recipe.write(str(folder)), verify=True)


def test_every_row_gets_the_codes_of_its_image_and_view(tmp_path):
    images = opened(IMAGES, tmp_path / "images")
    conditions = ConditionCodes(opened(CONDITIONS, tmp_path / "conditions"), images)
    rows = np.random.default_rng(0).permutation(images.num_rows)
    labels = conditions.labels(rows)
    assert labels.shape == (76, 4) and labels.dtype == np.int64
    codes_by_id = dict(zip(CONDITIONS.image_ids.tolist(), CONDITIONS.codes))
    for row, found in zip(rows, labels):
        assert (found == codes_by_id[IMAGES.image_ids[row // 2]][row % 2]).all()


def test_images_without_a_condition_are_refused(tmp_path):
    images = opened(IMAGES, tmp_path / "images")
    fewer = opened(Recipe(num_images=38, bad_images=(5, 30)), tmp_path / "conditions")
    with pytest.raises(ArtefactError, match="conditions .* lacks 3 of the 38 images of .*, such as image_id 130"):
        ConditionCodes(fewer, images)


SCENES = "scenes://{}/train/{{}}/16"
OTHER_IMAGES = {
    "scenes of another seed": (
        {"uri": SCENES.format(0)},
        {"uri": SCENES.format(1)},
        "scenes://1/train/100/16 there and scenes://0/train/100/16 here. Tokenize both from the same source.",
    ),
    "files of the same names": (
        {"uri": "/a/{}.png", "num_bytes": 50, "etag": "segmentation:9"},
        {"uri": "/b/{}.png", "num_bytes": 51, "etag": "segmentation:9"},
        "/b/100.png of 51 bytes there and /a/100.png of 50 bytes here",
    ),
    "files that were replaced": ({"num_bytes": 50}, {"num_bytes": 51}, "image-100 of 51 bytes there and image-100 of 50 bytes here"),
    "rows of another file": ({"uri": "parquet://a#{}", "etag": "x"}, {"uri": "parquet://b#{}", "etag": "y"}, "parquet://b#100 there"),
}
SAME_IMAGES = {
    "moved files": ({"uri": "/a/{}.png", "num_bytes": 50}, {"uri": "s3://b/{}.png", "num_bytes": 50}),
    "moved rows": ({"uri": "parquet://a#{}", "etag": "x"}, {"uri": "parquet://b#{}", "etag": "x"}),
    "read with maps and without": ({"etag": None}, {"etag": "segmentation:9"}),
    "listed with sizes and without": ({"num_bytes": None}, {"num_bytes": 50}),
}


@pytest.mark.parametrize("case", OTHER_IMAGES)
def test_conditions_of_other_images_with_the_same_ids_are_refused(tmp_path, case):
    ours, theirs, text = OTHER_IMAGES[case]
    images = opened(dataclasses.replace(IMAGES, **ours), tmp_path / "images")
    conditions = opened(dataclasses.replace(CONDITIONS, **theirs), tmp_path / "conditions")
    with pytest.raises(ArtefactError) as error:
        ConditionCodes(conditions, images)
    start = f"The code dataset of conditions {conditions.path} was made of other images than {images.path}: image_id 100 is {text}"
    assert str(error.value).startswith(start)


@pytest.mark.parametrize("case", SAME_IMAGES)
def test_conditions_of_the_same_images_pass(tmp_path, case):
    ours, theirs = SAME_IMAGES[case]
    images = opened(dataclasses.replace(IMAGES, **ours), tmp_path / "images")
    conditions = ConditionCodes(opened(dataclasses.replace(CONDITIONS, **theirs), tmp_path / "conditions"), images)
    assert conditions.labels(np.arange(4)).shape == (4, 4)


def test_other_random_crops_are_refused(tmp_path):
    views = "random-crop@0.8/{}"
    images = opened(dataclasses.replace(IMAGES, views=views), tmp_path / "images")
    same = opened(dataclasses.replace(CONDITIONS, views=views), tmp_path / "same")
    ConditionCodes(same, images)
    other = opened(dataclasses.replace(CONDITIONS, views=views, last_crop=(1.5, 2.25, 30, 40)), tmp_path / "other")
    with pytest.raises(ArtefactError, match=r"random-crop@0.8/1 of image_id 100 is \[1.5, 2.25, .* there and \[1.5, 2.0, .* here"):
        ConditionCodes(other, images)


def test_images_are_found_in_any_order_and_missing_ones_are_told(tmp_path):
    dataset = opened(CONDITIONS, tmp_path / "conditions")
    ids = dataset.image_ids(2 * np.arange(dataset.num_images))
    wanted = np.append(ids[::-1], [ids.max() + 1, ids.min() - 1])
    assert find_images(dataset, wanted).tolist() == [*range(dataset.num_images - 1, -1, -1), -1, -1]


def test_other_views_are_refused(tmp_path):
    images = opened(IMAGES, tmp_path / "images")
    with pytest.raises(ArtefactError, match="Tokenize both with the same images.views"):
        ConditionCodes(opened(Recipe(num_images=40, num_views=1), tmp_path / "conditions"), images)


def test_damage_is_found_when_it_is_read(tmp_path):
    images, root = opened(IMAGES, tmp_path / "images"), CONDITIONS.write(str(tmp_path / "conditions"))
    dataset = CodeDataset.open(root, verify=False)
    conditions = ConditionCodes(dataset, images)
    part = dataset.manifest["parts"][0]
    flip_bit(storage.join(root, part["path"]), 8 * part["row_groups"][0]["columns"]["codes"]["offset"])
    with pytest.raises(ArtefactError, match="conditions"):
        conditions.labels(np.arange(images.num_rows), wait=False)
        conditions.settle()


def test_no_path_is_an_error_of_the_configuration(tmp_path):
    images = opened(IMAGES, tmp_path / "images")
    with pytest.raises(ConfigError, match="conditioning.codes_path is not set, but conditioning.name is codes"):
        open_conditions(None, images, CodesOptions(), verify=False, key="conditioning.codes_path")
