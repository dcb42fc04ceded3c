"""Whether a tokenizer and image options are those that a code dataset was made with."""

from typing import Any

import torch

from pipeline.code_dataset import CodeDataset
from pipeline.encoding import prepare_tokenizer
from pipeline.inputs import IMAGE, input_spec
from pipeline.probe import check_probe
from pipeline.tokenizers import open_tokenizer
from stages.errors import ArtefactError, ConfigError
from stages.first_stage.tokenizer import Tokenizer
from stages.options import CodesOptions, ImageOptions, TokenizerOptions


def encoding_of(manifest: dict[str, Any]) -> dict[str, Any]:
    """How a dataset's codes were made: tokenizer fingerprint, preprocessing, numeric mode, and the golden images' codes."""
    return {
        "tokenizer": manifest["tokenizer"]["fingerprint"],
        **{name: manifest.get(name) for name in ("preprocess", "encode", "probe")},
    }


def check_tokenizer(path: str, tokenizer: Tokenizer, encoding: dict[str, Any], made_for: str) -> None:
    """Refuses a tokenizer that is not the one that made the codes, or that works otherwise on this machine.

    Args:
        path: of the tokenizer, for the message.
        tokenizer: as it is about to be used, from `prepare_tokenizer`.
        encoding: of the code dataset.
        made_for: the code dataset or checkpoint that rests on those codes, for the message.

    Raises:
        ArtefactError: naming both sides.
    """
    if tokenizer.fingerprint != encoding["tokenizer"]:
        raise ArtefactError(
            f"tokenizer.path is {path} with fingerprint {tokenizer.fingerprint}, but {made_for} rests on codes of tokenizer "
            f"{encoding['tokenizer']}. Name that tokenizer."
        )
    if encoding["probe"]:
        mode = encoding["encode"]
        options = CodesOptions(encode_precision=mode["precision"], encode_batch_size=mode["batch_size"])
        check_probe(tokenizer, options, encoding["probe"], made_for)


def check_dataset(dataset: CodeDataset, tokenizer: TokenizerOptions, images: ImageOptions) -> None:
    """Refuses a configuration whose tokenizer or image options are not those that a code dataset was made with.

    Raises:
        ArtefactError: another tokenizer, a damaged one, or a machine that encodes otherwise.
        ConfigError: other image options.
    """
    encoding = encoding_of(dataset.manifest)
    check_preprocessing(images, tokenizer, dataset)
    found = prepare_tokenizer(open_tokenizer(tokenizer.path), torch.device("cpu"))
    check_tokenizer(tokenizer.path, found, encoding, f"the code dataset {dataset.path}")


def check_preprocessing(images: ImageOptions, tokenizer: TokenizerOptions, dataset: CodeDataset) -> None:
    """Refuses images, or a map of them, prepared otherwise than those the codes were made of.

    Raises:
        ConfigError: naming every key that differs, with both values.
    """
    here, there = ({"input": IMAGE, **spec} for spec in (input_spec(images, tokenizer), dataset.manifest["preprocess"]))
    differing = [key for key in sorted({*here, *there}) if here.get(key) != there.get(key)]
    if differing:
        ours = ", ".join(f"{_section(key)}.{key} is {here.get(key)}" for key in differing)
        theirs = ", ".join(f"{key} {there.get(key)}" for key in differing)
        raise ConfigError(
            f"{ours}, but the code dataset {dataset.path} was made with {theirs}. Set them as they were for tokenize."
        )


def _section(key: str) -> str:
    return "tokenizer" if key in ("input", "num_labels") else "images"
