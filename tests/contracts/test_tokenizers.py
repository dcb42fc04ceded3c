"""What every tokenizer must do, whatever its quantizer."""

import dataclasses

import pytest
import torch
from quantizer_support import QUANTIZER_SHAPES
from tests_support import TINY_TOKENIZER

from pipeline.tokenizers import store_tokenizer
from stages.first_stage.artefact import load_tokenizer
from stages.first_stage.tokenizer import Tokenizer

CONFIGS = {
    **{
        kind: dataclasses.replace(
            TINY_TOKENIZER, quantizer=kind, codebook_size=size, codebook_dim=dim, fsq_levels=levels
        )
        for kind, (size, dim, levels) in QUANTIZER_SHAPES.items()
    },
    "grey": dataclasses.replace(TINY_TOKENIZER, in_channels=1),
    "attention": dataclasses.replace(TINY_TOKENIZER, attention_resolutions=(8,)),
}


@pytest.fixture(params=sorted(CONFIGS))
def tokenizer(request):
    torch.manual_seed(0)
    return Tokenizer(CONFIGS[request.param]).eval()


@pytest.fixture
def images(tokenizer):
    return torch.rand(5, tokenizer.config.in_channels, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_codes_have_the_promised_shape_and_range(tokenizer, images):
    codes = tokenizer.encode(images)
    h, w = tokenizer.grid(16)
    assert codes.shape == (5, h * w) and codes.dtype == torch.int64
    assert codes.min() >= 0 and codes.max() < tokenizer.codebook_size
    assert tokenizer.decode(codes.view(5, h, w)).shape == images.shape


def test_encoding_twice_gives_the_same_codes(tokenizer, images):
    assert torch.equal(tokenizer.encode(images), tokenizer.encode(images))


def test_codes_do_not_depend_on_the_rest_of_the_batch(tokenizer, images):
    together = tokenizer.encode(images)
    others = torch.cat([images[:1], torch.zeros_like(images[1:])])
    assert torch.equal(tokenizer.encode(others)[0], together[0])


def test_saving_keeps_codes_and_fingerprint(tokenizer, images, tmp_path):
    mark = store_tokenizer(tokenizer, str(tmp_path))
    loaded = load_tokenizer(str(tmp_path))
    assert loaded.fingerprint == mark
    assert torch.equal(loaded.encode(images), tokenizer.encode(images))
