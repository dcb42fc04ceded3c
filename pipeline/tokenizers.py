"""Opens tokenizer artefacts from any storage."""

import os
import tempfile

from pipeline import storage
from stages.errors import ArtefactError
from stages.first_stage.artefact import CONFIG, WEIGHTS, load_tokenizer, read_config, save_tokenizer
from stages.first_stage.tokenizer import Tokenizer


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
    if storage.is_local(path):
        return read_config(path)["fingerprint"]
    with tempfile.TemporaryDirectory() as folder:
        _download(path, (CONFIG,), folder)
        return read_config(folder)["fingerprint"]


def store_tokenizer(tokenizer: Tokenizer, path: str) -> str:
    """Writes a tokenizer to a local or s3:// path, `config.json` last, and returns its fingerprint.

    Raises:
        ArtefactError: another tokenizer is there already.
    """
    if storage.is_local(path):
        return save_tokenizer(tokenizer, path)
    with tempfile.TemporaryDirectory() as folder:
        mark = save_tokenizer(tokenizer, folder)
        for name in (WEIGHTS, CONFIG):
            if not storage.put_file_if_absent(storage.join(path, name), os.path.join(folder, name)):
                present = storage.read_bytes(storage.join(path, name))
                with open(os.path.join(folder, name), "rb") as file:
                    if present != file.read():
                        raise ArtefactError(
                            f"{path}/{name} is there already, but with other contents. Choose another folder."
                        )
    return mark


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
