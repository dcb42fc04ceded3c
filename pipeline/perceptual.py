"""The weights of the perceptual loss: from a path, S3 or the web to tensors, checked against a hash."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from pipeline import storage
from pipeline.downloads import fetch, file_sha256
from stages.errors import ConfigError, StorageError
from stages.first_stage.lpips import Lpips
from stages.first_stage.unpickle import read_checkpoint
from stages.options import TokenizerTrainOptions

MIN_DIGITS = 8  # of a hash that is shortened, as in the names of torchvision's files


def load_lpips(train: TokenizerTrainOptions) -> tuple[Lpips, dict[str, str]] | None:
    """The network of the perceptual term and the sha-256 of each of its files; None where the term has no weight.

    Raises:
        ConfigError: a file is missing, has another hash or not the tensors that are needed, or a web address comes without a hash.
        ArtefactError: a file is no checkpoint, or one that would run code.
        StorageError: a download fails.
    """
    if train.perceptual_weight == 0:
        return None
    hashes, found = {}, {}
    for key in ("perceptual_vgg", "perceptual_heads"):
        address, expected = getattr(train, key), getattr(train, f"{key}_sha256")
        if address is None:
            continue
        with _local_file(key, address, expected) as path:
            hashes[key] = _check_hash(key, address, path, expected)
            found[key] = _tensors(path)
    if "perceptual_vgg" not in found:
        raise ConfigError(
            f"tokenizer_train.perceptual_weight is {train.perceptual_weight}, but tokenizer_train.perceptual_vgg names no weights. "
            f"Name a file of VGG16 weights, or set the weight to 0."
        )
    return Lpips(found["perceptual_vgg"], found.get("perceptual_heads")), hashes


@contextmanager
def _local_file(key: str, address: str, expected: str | None) -> Iterator[str]:
    if address.startswith(("http://", "https://")):
        if expected is None:
            raise ConfigError(
                f"tokenizer_train.{key} is {address}, but what comes from the web must have a known hash. Give "
                f"tokenizer_train.{key}_sha256."
            )
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, os.path.basename(address) or "weights")
            _download(key, address, path)
            yield path
        return
    if not storage.exists(address):
        raise ConfigError(f"tokenizer_train.{key} is {address}, but there is no such file. Name a file of weights.")
    if storage.is_local(address):
        yield address
        return
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, os.path.basename(address))
        storage.download(address, path)
        yield path


def _download(key: str, address: str, path: str) -> None:
    try:
        fetch(address, path)
    except OSError as error:
        raise StorageError(
            f"tokenizer_train.{key} is {address}, but it cannot be downloaded ({error}). Download it elsewhere and name the file."
        ) from error


def _check_hash(key: str, address: str, path: str, expected: str | None) -> str:
    found = file_sha256(path)
    if expected is not None and (len(expected) < MIN_DIGITS or not found.startswith(expected.lower())):
        raise ConfigError(
            f"tokenizer_train.{key}_sha256 is {expected}, but {address} has {found}. Check the file, or correct the hash."
        )
    return found


def _tensors(path: str) -> dict[str, Tensor]:
    content = read_checkpoint(path)
    nested = content.get("state_dict", content)
    return {name: value for name, value in nested.items() if isinstance(value, Tensor)}
