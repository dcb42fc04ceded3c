"""What the losses of the quantizers weigh. Imports no torch."""

from stages.errors import ConfigError
from stages.options import TokenizerTrainOptions

NEAREST = ("vq", "vq-l2", "vq-ema", "simvq")
LOSS_NAMES = ("codebook", "commitment", "index", "entropy", "kl")
# By kind of quantizer. The entropy of nearest-entry kinds is computed only where it has a weight.
LOSSES_OF = {
    "vq": ("codebook", "commitment", "entropy"),
    "vq-l2": ("codebook", "commitment", "entropy"),
    "vq-ema": ("commitment", "entropy"),
    "simvq": ("codebook", "commitment", "entropy"),
    "ibq": ("index", "codebook", "commitment", "entropy"),
    "gumbel": ("kl",),
    "fsq": (),
    "lfq": ("commitment", "entropy"),
    "bsq": ("entropy",),
}
DEFAULTS = {"codebook": 1.0, "commitment": 0.25, "index": 1.0, "entropy": 0.1, "kl": 5e-4}
# TencentARC/SEED-Voken weighs the two sides of IBQ's distance the other way round.
DEFAULTS_OF = {"ibq": {"codebook": 0.25, "commitment": 1.0, "entropy": 0.05}}
# Every published model of CompVis/taming-transformers: the commitment weight 0.25 multiplies the codebook's term instead.
PRESETS = {"compvis-legacy": {"codebook": 0.25, "commitment": 1.0, "kl": 1e-8}}


def check_losses(quantizer: str, options: TokenizerTrainOptions) -> None:
    """Checks that what is asked for has a meaning for this quantizer.

    Raises:
        ConfigError: a weight is given for a loss it does not have, a preset that sets none it has, a gradient for one that hands
            none on, or the weights contradict the preset.
    """
    loss_weights(quantizer, options)
    preset = PRESETS[options.loss_preset] if options.loss_preset else {}
    if preset and not preset.keys() & LOSSES_OF[quantizer]:
        raise ConfigError(
            f"tokenizer_train.loss_preset is {options.loss_preset}, but it sets the weights of {', '.join(preset)} alone, and "
            f"tokenizer.quantizer={quantizer} has only: {', '.join(LOSSES_OF[quantizer]) or 'none'}. Leave it out."
        )
    for name in LOSS_NAMES:
        given = getattr(options, f"{name}_weight", None)
        if given and name not in LOSSES_OF[quantizer]:
            raise ConfigError(
                f"tokenizer_train.{name}_weight is {given}, but tokenizer.quantizer={quantizer} has no such loss, only: "
                f"{', '.join(LOSSES_OF[quantizer]) or 'none'}. Leave it out."
            )
    if options.quantizer_gradient != "straight-through" and quantizer not in NEAREST:
        raise ConfigError(
            f"tokenizer_train.quantizer_gradient is {options.quantizer_gradient}, but only {', '.join(NEAREST)} hand on a gradient in "
            f"a way one can choose and tokenizer.quantizer is {quantizer}. Leave it out."
        )


def loss_weights(quantizer: str, options: TokenizerTrainOptions) -> dict[str, float]:
    """Weight of every name in LOSS_NAMES, for this kind of quantizer.

    Raises:
        ConfigError: a weight is given that the preset sets too.
    """
    preset = PRESETS[options.loss_preset] if options.loss_preset else {}
    weights = DEFAULTS | DEFAULTS_OF.get(quantizer, {}) | preset
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
