"""The YAML file beside a checkpoint of CompVis/taming-transformers or latent-diffusion: what its tensors cannot tell.

Only values are read. The classes it names (`target`) are compared with known names and never imported.
"""

from dataclasses import dataclass
from typing import Any

import yaml

from stages.errors import ConfigError

NO_CONDITION, FIRST_STAGE = "__is_unconditional__", "__is_first_stage__"


@dataclass(frozen=True)
class Target:
    """A `target` with its `params`: the last part of the class name, and the keyword arguments."""

    name: str
    params: dict[str, Any]


@dataclass(frozen=True)
class Project:
    """A project file.

    Attributes:
        path: the file, for messages.
        model: its `model` section.
    """

    path: str
    model: Target

    def part(self, key: str) -> Target | str | None:
        """The class that a parameter of the model describes, the bare word given for it, or None without it."""
        value = self.model.params.get(key)
        return value if isinstance(value, str) or value is None else _target(value, f"model.params.{key}", self.path)

    def autoencoder(self, key: str = "first_stage_config") -> Target | None:
        """The class of an autoencoder: that part of a transformer's project, or the model itself."""
        if "ddconfig" in self.model.params:
            return self.model if key == "first_stage_config" else None
        part = self.part(key)
        if part == FIRST_STAGE and key != "first_stage_config":
            return self.autoencoder()
        return part if isinstance(part, Target) else None


def read_project(path: str) -> Project:
    """The project file at a local path.

    Raises:
        ConfigError: missing, not YAML, or without a model.
    """
    try:
        with open(path, encoding="utf-8") as file:
            tree = yaml.safe_load(file)
    except OSError as error:
        raise ConfigError(f"--config is {path}, but it cannot be read: {error.strerror}. Check the path.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config is {path}, but it is not valid YAML: {error}. Fetch it again.") from None
    model = tree.get("model") if isinstance(tree, dict) else None
    return Project(path, _target(model, "model", path))


def number(target: Target, key: str, path: str, default: int | None = None) -> int | None:
    """A parameter that must be a whole number, 0 or more, or the default where the file does not give it.

    Raises:
        ConfigError: it is something else, such as an interpolation.
    """
    value = target.params.get(key, default)
    if value is not default and (type(value) is not int or value < 0):
        raise ConfigError(f"{key} in {path} is {value!r}, but it must be a whole number. Write the number there.")
    return value


def _target(value: Any, key: str, path: str) -> Target:
    params = value.get("params") or {} if isinstance(value, dict) else None
    if not isinstance(params, dict) or not isinstance(value.get("target"), str):
        raise ConfigError(
            f"--config is {path}, but its {key} is no target with params. Name the YAML file that came with the checkpoint."
        )
    return Target(value["target"].rpartition(".")[2], params)
