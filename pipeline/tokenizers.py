"""Tokenizer artefacts, and the files of other projects, in any storage."""

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from safetensors import SafetensorError
from safetensors.torch import load

from pipeline import storage
from stages.compvis_project import Project, read_project
from stages.errors import ArtefactError, ConfigError
from stages.first_stage.artefact import CONFIG, WEIGHTS, architecture, encode_artefact, load_tokenizer, read_config
from stages.first_stage.foreign import DIFFUSERS_WEIGHTS
from stages.first_stage.import_export import export_tokenizer
from stages.first_stage.tokenizer import Tokenizer
from stages.first_stage.tokenizer_config import TokenizerConfig


def open_tokenizer(path: str) -> Tokenizer:
    """The tokenizer at a local or s3:// path, in eval mode, checked against its fingerprint.

    Raises:
        ArtefactError: missing, unfinished or damaged.
    """
    if storage.is_local(path):
        return load_tokenizer(path)
    with tempfile.TemporaryDirectory() as folder:
        _download(path, (CONFIG, WEIGHTS), folder)
        return load_tokenizer(folder)


def tokenizer_fingerprint(path: str) -> str:
    """The fingerprint that the artefact at `path` declares, without loading its weights."""
    return _read_config(path)["fingerprint"]


def tokenizer_architecture(path: str) -> TokenizerConfig | None:
    """The architecture of the artefact at `path`, without loading its weights; None where there is none.

    Raises:
        ArtefactError: it is damaged.
    """
    if not storage.exists(storage.join(path, CONFIG)):
        return None
    try:
        return architecture(_read_config(path))
    except (TypeError, ValueError) as error:
        raise ArtefactError(f"{path} is a damaged tokenizer ({error}), but its {CONFIG} must describe one. Re-create it.") from error


def _read_config(path: str) -> dict:
    if storage.is_local(path):
        return read_config(path)
    with tempfile.TemporaryDirectory() as folder:
        _download(path, (CONFIG,), folder)
        return read_config(folder)


def store_tokenizer(tokenizer: Tokenizer, path: str) -> str:
    """Writes a tokenizer to a local or s3:// path, `config.json` last, and returns its fingerprint.

    Raises:
        ArtefactError: another tokenizer is there already; artefacts are never overwritten.
    """
    files = encode_artefact(tokenizer)
    if storage.exists(storage.join(path, CONFIG)):  # a folder of something else stays as it is
        _check_same(path, CONFIG, files)
    for name, data in files.items():
        if not storage.put_if_absent(storage.join(path, name), data):
            _check_same(path, name, files)
    return json.loads(files[CONFIG])["fingerprint"]


def _check_same(path: str, name: str, files: dict[str, bytes]) -> None:
    """Refuses a file that is there and not of the same tokenizer; another version may have written it in other words."""
    present, ours = storage.read_bytes(storage.join(path, name)), json.loads(files[CONFIG])["fingerprint"]
    try:
        if name == CONFIG:
            is_same = json.loads(present).get("fingerprint") == ours
        else:
            is_same = _are_same_tensors(load(present), load(files[name]))
    except (SafetensorError, ValueError, AttributeError):
        is_same = False
    if not is_same:
        raise ArtefactError(f"{path} holds another {name}, but that of tokenizer {ours} was to be written. Choose another folder.")


def _are_same_tensors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


@contextmanager
def local_weights(file: str) -> Iterator[str]:
    """A local path of another project's checkpoint: a file, with the config.json beside it, or a diffusers folder.

    Errors about a file that was fetched name it where it came from.

    Raises:
        ConfigError: it is an s3:// path at which there is nothing.
    """
    if storage.is_local(file):
        yield file
        return
    is_file = storage.exists(file)
    origin, name = file.rsplit("/", 1) if is_file else (file.rstrip("/"), "")
    wanted = [name] if is_file else _diffusers_weights(origin)
    with tempfile.TemporaryDirectory() as folder:
        for part in wanted + [CONFIG] * storage.exists(storage.join(origin, CONFIG)):
            storage.download(storage.join(origin, part), os.path.join(folder, part))
        try:
            yield os.path.join(folder, name).rstrip("/")
        except (ArtefactError, ConfigError) as error:
            error.args = (str(error).replace(folder, origin),)
            raise


def _diffusers_weights(folder: str) -> list[str]:
    """The name of the weights in a folder of a store; none if only other files are in it or below it, as in that of a pipeline."""
    found = set(storage.list_files(folder))
    if not found:
        raise ConfigError(f"file is {folder}, but there is no such file. Check the path.")
    return [name for name in DIFFUSERS_WEIGHTS if storage.join(folder, name) in found][:1]


def open_project(path: str | None) -> Project | None:
    """The project file at a local or s3:// path, if there is a path. Raises what `read_project` raises."""
    if path is None:
        return None
    with local_weights(path) as local:
        return replace(read_project(local), path=path)


def store_export(tokenizer: Tokenizer, format: str, path: str) -> str:
    """`export_tokenizer` to a local or s3:// folder. Raises what that raises."""
    if storage.is_local(path):
        return export_tokenizer(tokenizer, format, path)
    with tempfile.TemporaryDirectory() as folder:
        weights = export_tokenizer(tokenizer, format, folder)
        for name in sorted(os.listdir(folder)):
            target = storage.join(path, name)
            if not storage.put_file_if_absent(target, os.path.join(folder, name)):
                raise ConfigError(f"output is {path}, but {target} is there already. Choose another folder.")
    return storage.join(path, os.path.basename(weights))


def _download(path: str, names: tuple[str, ...], folder: str) -> None:
    for name in names:
        try:
            data = storage.read_bytes(storage.join(path, name))
        except FileNotFoundError:
            raise ArtefactError(
                f"tokenizer.path is {path}, but there is no {name} in it. Run train-tokenizer or import-tokenizer first."
            ) from None
        with open(os.path.join(folder, name), "wb") as file:
            file.write(data)
