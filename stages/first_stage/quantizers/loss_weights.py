"""What the losses of the quantizers weigh. Imports no torch."""

from stages.errors import ConfigError
from stages.options import TokenizerTrainOptions

LOSS_NAMES = ("codebook", "commitment", "index", "entropy", "kl")
DEFAULTS = {"codebook": 1.0, "commitment": 0.25, "index": 1.0, "entropy": 0.1, "kl": 5e-4}
# Every published model of CompVis/taming-transformers: the commitment weight 0.25 multiplies the codebook's term instead.
PRESETS = {"compvis-legacy": {"codebook": 0.25, "commitment": 1.0, "kl": 1e-8}}


def loss_weights(options: TokenizerTrainOptions) -> dict[str, float]:
    """Weight of every name in LOSS_NAMES.

    Raises:
        ConfigError: a weight is given that the preset sets too.
    """
    preset = PRESETS[options.loss_preset] if options.loss_preset else {}
    weights = DEFAULTS | preset
    for name in LOSS_NAMES:
        given = getattr(options, f"{name}_weight", None)
        if given is not None and name in preset:
            raise ConfigError(
                f"tokenizer_train.{name}_weight is {given}, but tokenizer_train.loss_preset={options.loss_preset} sets it to "
                f"{preset[name]}. Leave out one of the two."
            )
        if given is not None:
            weights[name] = given
    return weights
