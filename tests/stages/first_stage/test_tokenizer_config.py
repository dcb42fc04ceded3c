"""Architectures that a configuration may not ask for."""

import pytest

from stages.errors import ConfigError
from stages.first_stage.tokenizer_config import tokenizer_config
from stages.options import ImageOptions, TokenizerOptions


@pytest.mark.parametrize(
    "tokenizer, images, words",
    [
        (TokenizerOptions(base_channels=40), ImageOptions(), ["tokenizer.base_channels is 40", "num_norm_groups, 32", "64"]),
        (TokenizerOptions(base_channels=32, num_norm_groups=12), ImageOptions(), ["base_channels is 32", "12", "Use 36"]),
        (TokenizerOptions(), ImageOptions(size=250), ["images.size is 250", "16", "256"]),
    ],
)
def test_architectures_that_cannot_be_are_refused(tokenizer, images, words):
    with pytest.raises(ConfigError) as caught:
        tokenizer_config(tokenizer, images)
    assert all(word in str(caught.value) for word in words)
