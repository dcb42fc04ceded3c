"""Paths of a command's options: the same ones in every process of a cluster, and in stores that can be used."""

import dataclasses
import os

import pytest

from pipeline.job_options import PATHS, select
from pipeline.tokenize_images import TokenizeOptions
from stages.errors import StorageError
from stages.options import Config, SourceOptions

MAPS = SourceOptions(name="image-folder", path="images", label_maps=("segmentation=labels/train",), number_maps=("depth=s3://b/depth",))
MISSING = "s3://no-such-bucket/labels"


def test_local_paths_become_absolute_those_of_maps_too(monkeypatch):
    monkeypatch.setattr("pipeline.job_options.check_reachable", lambda key, path: None)
    source = select(TokenizeOptions, Config(source=MAPS)).source
    assert source.path == os.path.abspath("images")
    assert source.label_maps == (f"segmentation={os.path.abspath('labels/train')}",)
    assert source.number_maps == ("depth=s3://b/depth",)


def test_every_path_of_the_configuration_is_known_as_one():
    sections = [getattr(Config(), field.name) for field in dataclasses.fields(Config)]
    names = {field.name for section in sections for field in dataclasses.fields(section)}
    assert {name for name in names if name == "path" or name.endswith("_path")} <= set(PATHS) <= names


@pytest.mark.parametrize(
    "source, key",
    [
        (SourceOptions(path=MISSING), "source.path"),
        (SourceOptions(label_maps=(f"segmentation={MISSING}",)), "source.label_maps[segmentation]"),
    ],
)
def test_a_store_that_is_not_there_is_named_by_its_key(s3, source, key):
    with pytest.raises(StorageError) as caught:
        select(TokenizeOptions, Config(source=source))
    assert str(caught.value).startswith(f"{key} is {MISSING}, but ")
