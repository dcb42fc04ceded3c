"""The quantizer of a tokenizer: the parts of the sections `tokenizer` and `tokenizer_train` that are about codes."""

from dataclasses import dataclass
from typing import Literal

from stages.options.declare import option


@dataclass(frozen=True, kw_only=True)
class QuantizerOptions:
    """Kind of quantizer and shape of its codebook."""

    quantizer: Literal["vq-l2", "vq", "vq-ema", "simvq", "ibq", "gumbel", "fsq", "lfq", "bsq"] = option(
        "vq-l2",
        "vq-l2: l2-normalised codes; vq: Euclidean; vq-ema: entries are moving averages; simvq: entries behind one linear map; ibq: "
        "index backpropagation; gumbel: Gumbel-softmax; fsq: a grid of levels; lfq, bsq: one bit per dimension, free or on the sphere.",
    )
    codebook_size: int | None = option(
        None,
        "Number of codes; 1024, or what fsq_levels or one bit per dimension make, if not given.",
        low=2,
        high=1 << 20,
    )
    codebook_dim: int | None = option(
        None, "Width of a code vector; 8, or what fsq_levels or one bit per dimension ask for, if not given.", low=1
    )
    fsq_levels: tuple[int, ...] = option((), "With fsq: levels per dimension; codebook_size is their product.", low=3, high=1000)


@dataclass(frozen=True, kw_only=True)
class QuantizerTrainOptions:
    """Weights of the quantizer's losses, its gradient and its schedules."""

    codebook_weight: float | None = option(
        None, "Weight of |sg[z] - e|^2, which moves the codebook; 1.0 (ibq: 0.25) if not given.", low=0.0
    )
    commitment_weight: float | None = option(
        None, "Weight of |z - sg[e]|^2, which moves the encoder; 0.25 (ibq: 1.0) if not given.", low=0.0
    )
    entropy_weight: float | None = option(
        None,
        "Weight of entropy per vector minus entropy of all; if not given, 0.1 for lfq and bsq, 0.05 for ibq, none for others.",
        low=0.0,
    )
    kl_weight: float | None = option(
        None, "gumbel: weight of the divergence from uniform choice; 0.0005 if not given.", low=0.0
    )
    loss_preset: Literal["compvis-legacy"] | None = option(
        None, "compvis-legacy: commitment 1.0, codebook 0.25, kl 1e-8, as in all published models of the original."
    )
    quantizer_gradient: Literal["straight-through", "rotation"] = option(
        "straight-through",
        "vq, vq-l2, vq-ema, simvq: how the gradient passes to the encoder; rotation: the rotation trick.",
    )
    codebook_decay: float = option(0.99, "vq-ema: decay of the moving averages per step.", low=0.0, high=0.9999)
    gumbel_start_temperature: float = option(1.0, "gumbel: temperature at the start.", above=0.0)
    gumbel_end_temperature: float = option(0.0625, "gumbel: temperature at the end, reached along a cosine.", above=0.0)
    kmeans_start: bool = option(True, "Place the entries on k-means centres of the first batch.")
    revive_every_steps: int = option(
        200, "Codes unused for so many steps move onto current encoder outputs; 0: never.", low=0
    )
    revive_share: float | None = option(
        None, "Share of the training after which no code is moved any more; 0.95 if not given.", low=0.0, high=1.0
    )
