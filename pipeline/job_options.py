"""A job's options out of a configuration, with paths that mean the same in every process of a cluster."""

import dataclasses
from typing import Any, TypeVar

from pipeline.sources.map_files import MAP_KEYS
from pipeline.storage import absolute, check_address, check_reachable
from stages.config import select_sections
from stages.options import Config

T = TypeVar("T")


def select(cls: type[T], config: Config, **extra: Any) -> T:
    """A command's options from the configuration, with paths made absolute: Ray workers run in folders of their own.

    Raises:
        ConfigError: one of the paths is an address of something else than S3.
        StorageError: one of them is in a store that cannot be used.
    """

    def resolve(section: Any) -> Any:
        paths = {name: absolute(path) for name, path in _plain_paths(section).items()}
        entries = {name: tuple(map(_absolute_entry, getattr(section, name))) for name in MAP_KEYS if hasattr(section, name)}
        return dataclasses.replace(section, **paths, **entries)

    options = select_sections(
        cls,
        dataclasses.replace(config, **{f.name: resolve(getattr(config, f.name)) for f in dataclasses.fields(config)}),
        **extra,
    )
    for field in dataclasses.fields(options):  # type: ignore[arg-type]  # cls is one of the options dataclasses
        check_reachable_paths(field.name, getattr(options, field.name))
    return options


PATHS = (
    "path",
    "holdout_path",
    "cache_path",
    "validation_path",
    "codes_path",
    "validation_codes_path",
    "weights_path",
    "reference_path",
    "perceptual_vgg",
    "perceptual_heads",
)
WEB_KEYS = ("perceptual_vgg", "perceptual_heads")  # may be addresses on the web


def check_addresses(config: Config) -> None:
    """Refuses a configuration with paths that are addresses of something else than S3.

    Raises:
        ConfigError: naming the key.
    """
    for field in dataclasses.fields(config):
        for key, path in section_paths(getattr(config, field.name)).items():
            check_address(f"{field.name}.{key}", path)


def check_reachable_paths(name: str, section: Any) -> None:
    """Refuses a section of the configuration, called `name`, whose paths cannot be used.

    Raises:
        ConfigError: an address of something else than S3.
        StorageError: naming the key.
    """
    for key, path in section_paths(section).items():
        check_reachable(f"{name}.{key}", path)


def section_paths(section: Any) -> dict[str, str]:
    """The paths that a section of the configuration names, by key; those in lists of NAME=PATH by key[NAME], in plain lists by key[i]."""
    entries = [(key, *entry.partition("=")) for key in MAP_KEYS for entry in getattr(section, key, ())]
    runs = {f"runs[{i}]": path for i, path in enumerate(getattr(section, "runs", ()))}
    return _plain_paths(section) | {f"{key}[{name}]": path for key, name, _, path in entries if path} | runs


def _plain_paths(section: Any) -> dict[str, str]:
    """Addresses on the web are none, where there may be one."""
    values = {name: getattr(section, name, None) for name in PATHS}
    return {name: value for name, value in values.items() if value and not (name in WEB_KEYS and value.startswith(("http://", "https://")))}


def _absolute_entry(entry: str) -> str:
    name, _, path = entry.partition("=")
    return f"{name}={absolute(path)}" if path else entry
