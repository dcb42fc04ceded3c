"""Names in registries, and classes of a user's own."""

import pytest

from stages.errors import ConfigError
from stages.registry import import_named

REGISTRY = {"config": "stages.options:Config"}


def test_a_name_and_a_path_give_the_same_class():
    assert import_named("key", "config", REGISTRY) is import_named("key", "stages.options:Config", {})


@pytest.mark.parametrize("name", ["unknown", "", "a.b", "module:", ":Class", ".module:Class"])
def test_what_is_neither_is_refused_with_the_names_there_are(name):
    with pytest.raises(ConfigError, match="key is .*, but it must be one of: config; or package.module:Class"):
        import_named("key", name, REGISTRY)


@pytest.mark.parametrize("name", ["no_such.module:Class", "stages.options:NoSuchClass"])
def test_a_class_that_is_not_there_is_refused(name):
    with pytest.raises(ConfigError, match=f"key is {name}, but it cannot be imported"):
        import_named("key", name, REGISTRY)
