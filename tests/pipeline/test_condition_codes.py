"""Codes of a condition beside those of images: by image and view, whatever else either dataset holds; refused where one is missing."""

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
