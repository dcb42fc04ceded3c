"""What a name in a registry, or a `package.module:Class` of a user's own, stands for."""

import importlib
import re
from collections.abc import Mapping
from typing import Any

from stages.errors import ConfigError

TARGET = re.compile(r"(\w+(?:\.\w+)*):(\w+)")


def import_named(key: str, name: str, registry: Mapping[str, str]) -> Any:
    """The class of that name.

    Args:
        key: of the configuration, for errors.
        name: a key of `registry`, or `package.module:Class`.
        registry: `package.module:Class` by name.

    Raises:
        ConfigError: no such name, or a class that cannot be imported.
    """
    target, known = TARGET.fullmatch(registry.get(name, name)), ", ".join(sorted(registry))
    if target is None:
        raise ConfigError(f"{key} is {name}, but it must be one of: {known}; or package.module:Class. Choose one.")
    try:
        return getattr(importlib.import_module(target[1]), target[2])
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"{key} is {name}, but it cannot be imported ({error}). Correct the name, or the Python path; or choose one of: {known}."
        ) from error
