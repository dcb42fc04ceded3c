"""Tiny objects that several test files use."""

from stages.first_stage.tokenizer import TokenizerConfig

TINY_TOKENIZER = TokenizerConfig(
    resolution=16,
    in_channels=3,
    codebook_size=32,
    codebook_dim=4,
    base_channels=32,
    channel_multipliers=(1, 2),
    num_res_blocks=1,
    attention_resolutions=(),
    z_channels=16,
    quantizer="vq-l2",
)
