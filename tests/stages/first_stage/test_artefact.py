"""The tokenizer artefact: written once, read strictly, every damage named."""

import dataclasses
import json
import os

import pytest
import torch
from quantizer_support import QUANTIZER_SHAPES
from tests_support import TINY_TOKENIZER

from pipeline.tokenizers import store_tokenizer
from stages.errors import ArtefactError
from stages.first_stage.artefact import CONFIG, WEIGHTS, fingerprint, load_tokenizer
from stages.first_stage.tokenizer import Tokenizer
from stages.first_stage.tokenizer_config import LATER_FIELDS, TokenizerConfig


@pytest.fixture
def tokenizer():
    torch.manual_seed(0)
    return Tokenizer(TINY_TOKENIZER).eval()


def test_round_trip(tokenizer, tmp_path):
    mark = store_tokenizer(tokenizer, str(tmp_path / "t"))
    loaded = load_tokenizer(str(tmp_path / "t"))
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    assert loaded.fingerprint == mark == fingerprint(loaded)
    assert torch.equal(loaded.encode(images), tokenizer.encode(images))
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())


def test_saving_the_same_again_is_harmless_and_another_is_refused(tokenizer, tmp_path):
    mark = store_tokenizer(tokenizer, str(tmp_path))
    assert store_tokenizer(tokenizer, str(tmp_path)) == mark
    with torch.no_grad():
        tokenizer.decoder.conv_out.bias += 1
    with pytest.raises(ArtefactError, match=f"{tmp_path} holds another {CONFIG}.*Choose another folder"):
        store_tokenizer(tokenizer, str(tmp_path))


def test_every_tensor_is_in_the_fingerprint(tokenizer):
    marks = {fingerprint(tokenizer)}
    for parameter in tokenizer.parameters():
        with torch.no_grad():
            parameter.view(-1)[0] += 1
        marks.add(fingerprint(tokenizer))
    assert len(marks) == 1 + len(list(tokenizer.parameters()))


@pytest.mark.parametrize("position", [0.02, 0.3, 0.6, 0.99])
def test_a_flipped_bit_is_seen(tokenizer, tmp_path, position):
    store_tokenizer(tokenizer, str(tmp_path))
    path = tmp_path / WEIGHTS
    data = bytearray(path.read_bytes())
    data[int(position * len(data))] ^= 4
    path.write_bytes(data)
    with pytest.raises(ArtefactError):
        load_tokenizer(str(tmp_path))


def test_unfinished_and_foreign_folders_are_refused(tokenizer, tmp_path):
    with pytest.raises(ArtefactError, match="train-tokenizer"):
        load_tokenizer(str(tmp_path))
    store_tokenizer(tokenizer, str(tmp_path))
    content = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps({**content, "format_version": 99}))
    with pytest.raises(ArtefactError, match="format version"):
        load_tokenizer(str(tmp_path))
    (tmp_path / CONFIG).write_text(json.dumps({name: value for name, value in content.items() if name != "fingerprint"}))
    with pytest.raises(ArtefactError, match="not a tokenizer"):
        load_tokenizer(str(tmp_path))
    for damaged in (b"{", b'{"format": "\xff"}'):
        (tmp_path / CONFIG).write_bytes(damaged)
        with pytest.raises(ArtefactError, match="damaged"):
            load_tokenizer(str(tmp_path))
    (tmp_path / CONFIG).write_text(json.dumps(content))
    os.remove(tmp_path / WEIGHTS)
    with pytest.raises(ArtefactError, match="damaged"):
        load_tokenizer(str(tmp_path))


def test_fingerprints_of_existing_tokenizers_stay(tokenizer):
    """A new option or quantizer must not change what older artefacts are known by."""
    plain = Tokenizer(dataclasses.replace(TINY_TOKENIZER, quantizer="vq"))
    with torch.no_grad():
        for i, parameter in enumerate(plain.parameters()):
            values = torch.arange(parameter.numel()).remainder(7) - 3
            parameter.copy_(values.view(parameter.shape) / (8 + i))
    assert fingerprint(plain) == "71d3739c56c663a6e952c49b99287ba090ff6276299e1ebf0a681a2f4d153fe5"


def test_the_groups_of_norms_are_part_of_the_identity(tmp_path):
    config = dataclasses.replace(TINY_TOKENIZER, base_channels=32, num_norm_groups=32)
    published = Tokenizer(config)
    shared = Tokenizer(dataclasses.replace(config, num_norm_groups=8))
    shared.load_state_dict(published.state_dict())
    assert fingerprint(published) != fingerprint(shared)
    store_tokenizer(shared, str(tmp_path))
    assert json.loads((tmp_path / CONFIG).read_text())["num_norm_groups"] == 8
    assert load_tokenizer(str(tmp_path)).config.num_norm_groups == 8


@pytest.mark.parametrize("kind", QUANTIZER_SHAPES)
def test_only_levels_add_a_key(kind, tmp_path):
    size, dim, levels = QUANTIZER_SHAPES[kind]
    config = dataclasses.replace(
        TINY_TOKENIZER, quantizer=kind, codebook_size=size, codebook_dim=dim, fsq_levels=levels
    )
    store_tokenizer(Tokenizer(config), str(tmp_path))
    content = json.loads((tmp_path / CONFIG).read_text())
    names = {f.name for f in dataclasses.fields(TokenizerConfig)} - LATER_FIELDS.keys()
    assert content.keys() - {"format", "format_version", "fingerprint"} == names | ({"fsq_levels"} if levels else set())
    assert content["quantizer"] == ("vq" if kind in ("vq", "vq-l2", "vq-ema", "simvq") else kind)
    assert (content["codebook_size"], content["codebook_dim"]) == (size, dim)


@pytest.mark.parametrize(
    "change",
    [
        {"quantizer": "cubic"},
        {"quantizer": "lfq"},
        {"codebook_size": 61},
        {"fsq_levels": [4, 3, 6]},
        {"fsq_levels": None},
        {"codebook_dim": None},
        {"num_norm_groups": 7},
        {"num_norm_groups": 0},
        {"channel_multipliers": []},
    ],
)
def test_a_contradictory_configuration_is_damage(change, tmp_path):
    size, dim, levels = QUANTIZER_SHAPES["fsq"]
    config = dataclasses.replace(
        TINY_TOKENIZER, quantizer="fsq", codebook_size=size, codebook_dim=dim, fsq_levels=levels
    )
    store_tokenizer(Tokenizer(config), str(tmp_path))
    content = json.loads((tmp_path / CONFIG).read_text()) | change
    (tmp_path / CONFIG).write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    with pytest.raises(ArtefactError, match="damaged tokenizer"):
        load_tokenizer(str(tmp_path))
