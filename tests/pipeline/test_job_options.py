"""Paths of a command's options: the same ones in every process of a cluster, and in stores that can be used."""

import os

import pytest

from cluster.tokenizer_options import TokenizerJobOptions
from pipeline.job_options import check_reachable_paths, select
from stages.errors import StorageError
from stages.options import Config, SourceOptions

MAPS = SourceOptions(name="image-folder", path="images", label_maps=("segmentation=labels/train",), number_maps=("depth=s3://b/depth",))
MISSING = "s3://no-such-bucket/labels"


def test_local_paths_become_absolute_those_of_maps_too(monkeypatch):
    monkeypatch.setattr("pipeline.job_options.check_reachable", lambda key, path: None)
    source = select(TokenizerJobOptions, Config(source=MAPS)).source
    assert source.path == os.path.abspath("images")
    assert source.label_maps == (f"segmentation={os.path.abspath('labels/train')}",)
    assert source.number_maps == ("depth=s3://b/depth",)


@pytest.mark.parametrize(
    "source, key",
    [
        (SourceOptions(path=MISSING), "source.path"),
        (SourceOptions(label_maps=(f"segmentation={MISSING}",)), "source.label_maps[segmentation]"),
    ],
)
def test_a_store_that_is_not_there_is_named_by_its_key(s3, source, key):
    with pytest.raises(StorageError) as caught:
        check_reachable_paths("source", source)
    assert str(caught.value).startswith(f"{key} is {MISSING}, but ")
