"""Configuration: YAML for people, frozen dataclasses for code, `section.key=value` arguments merged on top.

`python -m stages.config` prints docs/configuration.md.
"""

import dataclasses
import inspect
import math
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import yaml

from stages.errors import ConfigError
from stages.options import Config

T = TypeVar("T")


class OneOfEachKey(yaml.SafeLoader):
    """YAML's plain values; a key that a mapping has twice is an error, where PyYAML forgets the first."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node, found = super().compose_mapping_node(anchor), set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in found:
                raise yaml.composer.ComposerError(None, None, f"the key {key.value} is there twice", key.start_mark)
            found.add(key.value)
        return node


def load_config(paths: str | Iterable[str], overrides: Iterable[str] = ()) -> Config:
    """The configuration in YAML files, each merged over the ones before it key by key, then `section.key=value` overrides.

    Raises:
        ConfigError: a file is missing or not YAML, a key is unknown, or a value has the wrong type or range.
    """
    tree: dict[str, Any] = {}
    for path in [paths] if isinstance(paths, str) else paths:
        for section, values in _read(path).items():
            _merge(tree, section, values)
    for override in overrides:
        section, values = _parse(override)
        _merge(tree, section, values)
    return build(Config, tree)


def _read(path: str) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            tree = yaml.load(file, OneOfEachKey)
    except OSError as error:
        raise ConfigError(
            f"-c is {path}, but it cannot be read: {error.strerror}. Name an existing YAML file."
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"-c is {path}, but it is not valid YAML: {error}. Mend the file.") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"-c is {path}, but it holds no mapping of sections. Start it with `run:`, `source:` ....")
    return tree


def _merge(tree: dict[str, Any], section: str, values: Any) -> None:
    """Puts the keys of a section over those it has; what is no mapping stays in the tree, for `build` to refuse."""
    before = tree.get(section, {})
    if isinstance(before, dict) and values is not None:  # an empty section is one without keys
        tree[section] = {**before, **values} if isinstance(values, dict) else values


def _parse(override: str) -> tuple[str, dict[str, Any]]:
    """Section and key of one `section.key=value` argument."""
    key, equals, text = override.partition("=")
    section, dot, name = key.partition(".")
    if not (equals and dot and section and name):
        raise ConfigError(
            f"Argument is {override!r}, but overrides read section.key=value. Write e.g. train.num_steps=100."
        )
    try:
        return section, {name: yaml.load(text, OneOfEachKey)}
    except yaml.YAMLError:
        return section, {name: text}


def build(cls: type[T], values: Mapping[str, Any], prefix: str = "") -> T:
    """An options dataclass from a mapping, refusing unknown keys, wrong types and values out of bounds.

    Raises:
        ConfigError: naming the key, the value and the rule.
    """
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    for name in values:
        if name not in fields:
            allowed = ", ".join(sorted(fields))
            raise ConfigError(f"{prefix}{name} is given, but there is no such key. Keys allowed here: {allowed}.")
    arguments: dict[str, Any] = {}
    for name, value in values.items():
        key, hint = f"{prefix}{name}", hints[name]
        if dataclasses.is_dataclass(hint):
            if not isinstance(value, Mapping):
                raise ConfigError(f"{key} is {value!r}, but it must be a section of keys. Indent its keys under it.")
            arguments[name] = build(typing.cast(type, hint), value, f"{key}.")
        else:
            arguments[name] = convert(key, value, hint)
            _check_bounds(key, arguments[name], fields[name].metadata)
    return cls(**arguments)


def convert(key: str, value: Any, hint: Any) -> Any:
    """`value` as the annotated type `hint`: int, float, str, bool, Literal, tuple[X, ...] or a union of these and None.

    YAML 1.1 reads `3e-4` as a string, so a float field also takes a string that spells a number.

    Raises:
        ConfigError: the value is of another type.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        kinds = [a for a in arguments if a is not type(None)]
        is_list = isinstance(value, list | tuple)
        fitting = [kind for kind in kinds if (typing.get_origin(kind) is tuple) == is_list]
        return convert(key, value, (fitting or kinds)[0])
    if origin is typing.Literal:
        if any(value == choice and type(value) is type(choice) for choice in arguments):
            return value
        choices = ", ".join(str(choice) for choice in arguments)
        raise ConfigError(f"{key} is {value!r}, but it must be one of: {choices}. Choose one of these.")
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{key} is {value!r}, but it must be a list. Write it as [a, b].")
        return tuple(convert(f"{key}[{i}]", item, arguments[0]) for i, item in enumerate(value))
    if hint is float and not isinstance(value, bool):
        try:
            return float(value)
        except (TypeError, ValueError, OverflowError):
            pass
    elif isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    wanted = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}[hint]
    raise ConfigError(f"{key} is {value!r}, but it must be {wanted}. Change its value.")


def _check_bounds(key: str, value: Any, bounds: Mapping[str, Any]) -> None:
    if isinstance(value, tuple):
        for i, item in enumerate(value):
            _check_bounds(f"{key}[{i}]", item, bounds)
    if not isinstance(value, int | float) or isinstance(value, bool):
        return
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{key} is {value}, but it must be a finite number. Change its value.")
    low, high, above, below = (bounds.get(name) for name in ("low", "high", "above", "below"))
    if low is not None and value < low:
        raise ConfigError(f"{key} is {value}, but it must be at least {low}. Raise it.")
    if high is not None and value > high:
        raise ConfigError(f"{key} is {value}, but it must be at most {high}. Lower it.")
    if above is not None and not value > above:
        raise ConfigError(f"{key} is {value}, but it must be above {above}. Raise it.")
    if below is not None and not value < below:
        raise ConfigError(f"{key} is {value}, but it must be below {below}. Lower it.")


def select_sections(cls: type[T], config: Config, **extra: Any) -> T:
    """An options dataclass `cls` whose fields are sections of `config`, or given in `extra`."""
    names = {f.name for f in dataclasses.fields(config)}
    sections = {f.name: getattr(config, f.name) for f in dataclasses.fields(cls) if f.name in names}  # type: ignore[arg-type]
    return cls(**sections, **extra)


def to_dict(options: Any) -> dict[str, Any]:
    """A dataclass as plain YAML/JSON values (tuples become lists)."""
    return {f.name: _plain(getattr(options, f.name)) for f in dataclasses.fields(options)}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    return list(value) if isinstance(value, tuple) else value


def to_yaml(options: Any) -> str:
    """A dataclass as YAML text that `load_config` reads back to an equal one."""
    return yaml.safe_dump(to_dict(options), sort_keys=False, default_flow_style=None)


def reference_page() -> str:
    """docs/configuration.md: every section and key with its type, default and meaning."""
    lines = ["# Configuration", "", _PREAMBLE]
    hints = typing.get_type_hints(Config)
    for section in dataclasses.fields(Config):
        cls = hints[section.name]
        lines += [
            "",
            f"## {section.name}",
            "",
            inspect.cleandoc(cls.__doc__ or ""),
            "",
            "| key | type | default | meaning |",
            "|---|---|---|---|",
        ]
        for f in dataclasses.fields(cls):
            default = _plain(f.default)
            lines.append(
                f"| `{f.name}` | {_type_name(typing.get_type_hints(cls)[f.name])} | `{default}` | {f.metadata['text']} |"
            )
    return "\n".join(lines) + "\n"


def _type_name(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        names = [_type_name(argument) for argument in arguments if argument is not type(None)]
        return " or ".join(names) + (", optional" if type(None) in arguments else "")
    if origin is typing.Literal:
        return " or ".join(str(choice) for choice in arguments)
    if origin is tuple:
        return f"list of {_type_name(arguments[0])}"
    return hint.__name__


_PREAMBLE = """A configuration is one YAML file of the sections below, or several: of `-c A -c B` the keys in B go over those in A.
Every key has a default. `section.key=value` arguments on the command line are merged on top. Unknown keys, wrong types and
values out of range are refused with the rule they break.
`python ray_job.py plan -c FILE` prints everything that follows from a configuration before any work starts, and every
command saves the resolved configuration beside its output. This page is made from the code: `python -m stages.config`."""


if __name__ == "__main__":
    print(reference_page(), end="")
