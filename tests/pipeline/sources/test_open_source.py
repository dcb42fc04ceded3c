"""Finding a source by name."""

import numpy as np
import pytest

from pipeline.sources import SOURCES, Example, listing, open_source
from stages.errors import ConfigError
from stages.options import ImageOptions, SourceOptions

IMAGES = ImageOptions(size=16)


class OnePixel:
    """A source of a user's own."""

    class_names: tuple[str, ...] = ()

    def __init__(self, options, images):
        pass

    def list_images(self, split):
        return listing(np.array([7]), ["one://7"])

    def fetch(self, uri):
        return b"\x05"

    def decode(self, data):
        return Example(np.frombuffer(data, np.uint8).reshape(1, 1, 1))


def test_an_unknown_name_is_refused_with_the_names_there_are():
    with pytest.raises(ConfigError) as error:
        open_source(SourceOptions(name="imagenet"), IMAGES)
    assert "source.name is imagenet" in str(error.value)
    assert all(name in str(error.value) for name in SOURCES)


def test_a_class_of_the_users_own_is_found(tmp_path, monkeypatch):
    code = "class Mine:\n    def __init__(self, options, images):\n        self.size = images.size\n"
    (tmp_path / "my_source.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert open_source(SourceOptions(name="my_source:Mine"), IMAGES).size == 16


@pytest.mark.parametrize("name", ["no_such_module:Class", "pipeline.sources.scenes:NoSuchClass"])
def test_a_class_that_is_not_there_is_refused(name):
    with pytest.raises(ConfigError, match=f"source.name is {name}, but it cannot be imported"):
        open_source(SourceOptions(name=name), IMAGES)


def test_a_listing_leaves_null_what_a_source_does_not_know():
    table = OnePixel(None, None).list_images("train")
    assert table.to_pylist() == [{"image_id": 7, "uri": "one://7", "label": None, "num_bytes": None, "etag": None}]
