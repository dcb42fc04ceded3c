"""The architectures that a configuration asks for, and those it may not."""

import pytest

from stages.errors import ConfigError
from stages.first_stage.tokenizer_config import tokenizer_config
from stages.options import ImageOptions, TokenizerOptions


@pytest.mark.parametrize(
    "tokenizer, images, words",
    [
        (TokenizerOptions(base_channels=42), ImageOptions(), ["tokenizer.base_channels is 42", "multiple of 4 unless", "Use 44"]),
        (TokenizerOptions(base_channels=144), ImageOptions(), ["tokenizer.base_channels is 144", "multiple of 32 unless", "Use 160"]),
        (TokenizerOptions(base_channels=32, num_norm_groups=12), ImageOptions(), ["is 32", "num_norm_groups, 12", "Use 36"]),
        (TokenizerOptions(), ImageOptions(size=250), ["images.size is 250", "16", "256"]),
    ],
)
def test_architectures_that_cannot_be_are_refused(tokenizer, images, words):
    with pytest.raises(ConfigError) as caught:
        tokenizer_config(tokenizer, images)
    assert all(word in str(caught.value) for word in words)


WIDTHS = (32, 64, 128, 256)


def test_norms_share_four_channels_as_in_published_models_unless_told():
    groups = {base: tokenizer_config(TokenizerOptions(base_channels=base), ImageOptions()).num_norm_groups for base in WIDTHS}
    assert groups == {32: 8, 64: 16, 128: 32, 256: 32}
    assert tokenizer_config(TokenizerOptions(base_channels=32, num_norm_groups=32), ImageOptions()).num_norm_groups == 32
