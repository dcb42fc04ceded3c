"""The weights of the quantizers' losses: explicit, by preset, never both."""

import pytest
from quantizer_support import features, quantizer_of

from stages.errors import ConfigError
from stages.first_stage.quantizers.loss_weights import LOSS_NAMES, LOSSES_OF, check_losses, loss_weights
from stages.options import TokenizerTrainOptions


def test_every_name_has_a_weight():
    assert tuple(loss_weights("vq", TokenizerTrainOptions())) == LOSS_NAMES
    ibq = loss_weights("ibq", TokenizerTrainOptions())  # SEED-Voken's IndexPropagationQuantize
    assert (ibq["index"], ibq["codebook"], ibq["commitment"], ibq["entropy"]) == (1.0, 0.25, 1.0, 0.05)
    assert loss_weights("ibq", TokenizerTrainOptions(commitment_weight=0.5))["commitment"] == 0.5


def test_given_weights_count():
    weights = loss_weights("vq", TokenizerTrainOptions(codebook_weight=2.0, commitment_weight=0.0, entropy_weight=0.3))
    assert weights == {"codebook": 2.0, "commitment": 0.0, "index": 1.0, "entropy": 0.3, "kl": 5e-4}


def test_the_preset_puts_the_weight_where_the_original_does():
    weights = loss_weights("vq", TokenizerTrainOptions(loss_preset="compvis-legacy"))
    assert (weights["commitment"], weights["codebook"], weights["kl"]) == (1.0, 0.25, 1e-8)


def test_preset_and_weight_contradict_each_other():
    options = TokenizerTrainOptions(loss_preset="compvis-legacy", codebook_weight=1.0)
    with pytest.raises(
        ConfigError, match=r"codebook_weight is 1.0, but tokenizer_train.loss_preset=compvis-legacy .* 0.25"
    ):
        loss_weights("vq", options)
    assert loss_weights("vq", TokenizerTrainOptions(loss_preset="compvis-legacy", entropy_weight=0.5))["entropy"] == 0.5


@pytest.mark.parametrize("kind", LOSSES_OF)
def test_the_losses_of_a_kind_are_those_it_computes(kind):
    quantizer = quantizer_of(kind)
    quantizer.configure(TokenizerTrainOptions(entropy_weight=0.1))
    assert set(quantizer(features(quantizer)).losses) == set(LOSSES_OF[kind])


@pytest.mark.parametrize(
    "kind, options, words",
    [
        ("fsq", {"commitment_weight": 0.5}, ["tokenizer_train.commitment_weight is 0.5", "quantizer=fsq", "none"]),
        ("gumbel", {"entropy_weight": 0.5}, ["entropy_weight is 0.5", "quantizer=gumbel", "only: kl"]),
        ("vq", {"kl_weight": 0.5}, ["kl_weight is 0.5", "only: codebook, commitment, entropy"]),
        ("bsq", {"quantizer_gradient": "rotation"}, ["quantizer_gradient is rotation", "vq-l2", "quantizer is bsq"]),
        ("fsq", {"loss_preset": "compvis-legacy"}, ["tokenizer_train.loss_preset is compvis-legacy", "quantizer=fsq has only: none"]),
        ("bsq", {"loss_preset": "compvis-legacy"}, ["loss_preset is compvis-legacy", "codebook, commitment, kl", "only: entropy"]),
        ("vq", {"loss_preset": "compvis-legacy", "commitment_weight": 1.0}, ["commitment_weight is 1.0", "preset"]),
    ],
)
def test_what_would_have_no_effect_is_refused(kind, options, words):
    with pytest.raises(ConfigError) as caught:
        check_losses(kind, TokenizerTrainOptions(**options))
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize("kind", [kind for kind in LOSSES_OF if kind not in ("fsq", "bsq")])
def test_the_preset_is_for_every_other_kind(kind):
    check_losses(kind, TokenizerTrainOptions(loss_preset="compvis-legacy"))


@pytest.mark.parametrize("kind", LOSSES_OF)
def test_defaults_suit_every_kind(kind):
    check_losses(kind, TokenizerTrainOptions())
