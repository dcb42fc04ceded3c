import dataclasses

import numpy as np
import pytest
import torch
from code_dataset_support import Recipe, replace_manifest
from tests_support import TINY_TOKENIZER

from pipeline.binding import check_dataset, check_tokenizer, encoding_of
from pipeline.code_dataset import CodeDataset
from pipeline.code_dataset.manifest import read_manifest
from pipeline.encoding import numeric_mode
from pipeline.probe import freeze_probe
from pipeline.tokenizers import open_tokenizer, store_tokenizer
from pipeline.views import preprocessing_spec
from stages.errors import ArtefactError, ConfigError
from stages.first_stage.tokenizer import Tokenizer
from stages.options import CodesOptions, ImageOptions, TokenizerOptions

IMAGES, CODES = ImageOptions(size=16), CodesOptions(encode_batch_size=16)


def stored_tokenizer(folder, seed=0):
    torch.manual_seed(seed)
    store_tokenizer(Tokenizer(TINY_TOKENIZER), str(folder))
    return str(folder)


@pytest.fixture
def path(tmp_path):
    return stored_tokenizer(tmp_path / "tokenizer")


@pytest.fixture
def dataset(tmp_path, path):
    """That says it was made with this tokenizer, of images of 16 pixels, in batches of 16."""
    root, tokenizer = Recipe().write(tmp_path / "codes"), open_tokenizer(path)
    manifest = read_manifest(root)
    replace_manifest(
        root,
        manifest
        | {
            "tokenizer": {"fingerprint": tokenizer.fingerprint},
            "preprocess": preprocessing_spec(IMAGES),
            "encode": numeric_mode(CODES),
            "probe": freeze_probe(root, manifest["plan_fp"], tokenizer, CODES),
        },
    )
    return CodeDataset.open(root, verify=True)


def test_the_configuration_that_made_a_dataset_fits_it(dataset, path):
    tokenizer = TokenizerOptions(path=path)
    check_dataset(dataset, tokenizer, IMAGES)
    check_dataset(dataset, tokenizer, dataclasses.replace(IMAGES, views=("flip",)))  # says what to store, not how


def test_a_map_is_not_an_image(dataset, path):
    tokenizer = TokenizerOptions(path=path, input="depth")
    with pytest.raises(ConfigError, match="tokenizer.input is depth, .* was made with input image"):
        check_dataset(dataset, tokenizer, IMAGES)


def test_another_tokenizer_is_refused_with_both_sides_named(dataset, tmp_path):
    other = stored_tokenizer(tmp_path / "other", seed=1)
    with pytest.raises(ArtefactError, match=f"tokenizer.path is {other} with fingerprint") as error:
        check_dataset(dataset, TokenizerOptions(path=other), IMAGES)
    for side in (open_tokenizer(other).fingerprint, dataset.tokenizer_fingerprint, dataset.path):
        assert side in str(error.value)


@pytest.mark.parametrize(
    "change, ours, theirs",
    [
        ({"size": 32}, "images.size is 32", "made with size 16"),
        ({"channels": 1}, "images.channels is 1", "made with channels 3"),
        ({"size": 32, "channels": 1}, "images.channels is 1, images.size is 32", "made with channels 3, size 16"),
    ],
)
def test_every_image_option_that_differs_is_named(dataset, path, change, ours, theirs):
    with pytest.raises(ConfigError) as error:
        check_dataset(dataset, TokenizerOptions(path=path), dataclasses.replace(IMAGES, **change))
    assert ours in str(error.value) and theirs in str(error.value)


def test_a_machine_that_encodes_otherwise_is_refused(dataset, path):
    encoding = encoding_of(dataset.manifest)
    codes = (np.array(encoding["probe"]["codes"]) + 1) % 32
    spoilt = {**encoding, "probe": {**encoding["probe"], "codes": codes.tolist()}}
    tokenizer = open_tokenizer(path)
    with pytest.raises(ArtefactError, match="other codes here .* than when the run R was made"):
        check_tokenizer(path, tokenizer, spoilt, "the run R")
    check_tokenizer(path, tokenizer, encoding, "the run R")


def test_the_golden_images_are_encoded_in_the_datasets_own_mode(dataset, path, monkeypatch):
    modes = []
    monkeypatch.setattr(
        "pipeline.binding.check_probe", lambda tokenizer, options, *_: modes.append(numeric_mode(options))
    )
    check_tokenizer(path, open_tokenizer(path), encoding_of(dataset.manifest), "-")
    assert modes == [dataset.manifest["encode"]]


def test_a_dataset_without_golden_images_is_bound_by_its_fingerprint(dataset, path):
    check_tokenizer(path, open_tokenizer(path), {**encoding_of(dataset.manifest), "probe": None}, "-")
    assert encoding_of({"tokenizer": {"fingerprint": "f"}}) == {
        "tokenizer": "f",
        "preprocess": None,
        "encode": None,
        "probe": None,
    }
