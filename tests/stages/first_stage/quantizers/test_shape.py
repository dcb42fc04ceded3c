"""What the codebook options make, and the contradictions that are refused."""

import pytest

from stages.errors import ConfigError
from stages.first_stage.quantizers.shape import codebook_shape
from stages.options import TokenizerOptions


@pytest.mark.parametrize(
    "options, shape",
    [
        ({}, (1024, 8)),
        ({"codebook_size": 300, "codebook_dim": 5}, (300, 5)),
        ({"quantizer": "fsq", "fsq_levels": (8, 5, 5, 5)}, (1000, 4)),
        ({"quantizer": "fsq", "fsq_levels": (8, 5), "codebook_size": 40, "codebook_dim": 2}, (40, 2)),
        ({"quantizer": "lfq"}, (1024, 10)),
        ({"quantizer": "bsq", "codebook_size": 65_536}, (65_536, 16)),
        ({"quantizer": "lfq", "codebook_dim": 14}, (16_384, 14)),
        ({"quantizer": "bsq", "codebook_dim": 9, "codebook_size": 512}, (512, 9)),
    ],
)
def test_given_or_implied(options, shape):
    assert codebook_shape(TokenizerOptions(**options)) == shape


@pytest.mark.parametrize(
    "options, words",
    [
        ({"fsq_levels": (8, 5)}, ["tokenizer.fsq_levels is [8, 5]", "quantizer is vq-l2", "tokenizer.quantizer=fsq"]),
        ({"quantizer": "fsq"}, ["tokenizer.fsq_levels is empty", "[8, 5, 5, 5]"]),
        ({"quantizer": "fsq", "fsq_levels": (64,) * 4}, ["fsq_levels is [64, 64, 64, 64]", "16777216", "1048576"]),
        (
            {"quantizer": "fsq", "fsq_levels": (8, 5), "codebook_size": 1024},
            ["tokenizer.codebook_size is 1024", "fsq_levels=[8, 5] makes it 40", "tokenizer.codebook_size=null"],
        ),
        (
            {"quantizer": "fsq", "fsq_levels": (8, 5), "codebook_dim": 8},
            ["tokenizer.codebook_dim is 8", "makes it 2"],
        ),
        ({"quantizer": "lfq", "codebook_size": 1000}, ["codebook_size is 1000", "powers of two", "512 or 1024"]),
        (
            {"quantizer": "bsq", "codebook_size": 1024, "codebook_dim": 8},
            ["codebook_size is 1024", "codebook_dim=8", "makes it 256"],
        ),
        ({"quantizer": "lfq", "codebook_dim": 30}, ["codebook_dim is 30", "2^30", "at most 20"]),
    ],
)
def test_contradictions_name_the_key_and_the_way_out(options, words):
    with pytest.raises(ConfigError) as caught:
        codebook_shape(TokenizerOptions(**options))
    assert all(word in str(caught.value) for word in words), str(caught.value)
