"""Options of the first stage: the tokenizer and its training."""

from dataclasses import dataclass
from typing import Literal

from stages.options.declare import option
from stages.options.quantizer import QuantizerOptions, QuantizerTrainOptions


@dataclass(frozen=True, kw_only=True)
class TokenizerOptions(QuantizerOptions):
    """The VQGAN: its folder and, for training one, its architecture (reference: Esser et al. 2020, section 3.1)."""

    path: str = option("runs/tokenizer", "Folder of the tokenizer artefact.")
    input: str = option("image", "What is tokenized: image, or a condition map of the source, such as segmentation or depth.")
    num_labels: int | None = option(
        None,
        "A map of ids below this is seen one-hot, in so many channels; maps of numbers in [0, 1] are one channel.",
        low=2,
        high=256,
    )
    base_channels: int = option(
        128, "Channels at full resolution; a multiple of num_norm_groups, without it of 4, and of 32 above 128.", low=4
    )
    channel_multipliers: tuple[int, ...] = option(
        (1, 1, 2, 2, 4), "Per level; each level but the last halves the image.", low=1
    )
    num_res_blocks: int = option(2, "Residual blocks per level.", low=1)
    attention_resolutions: tuple[int, ...] = option((16,), "Feature-map sides at which self-attention is used.")
    num_norm_groups: int | None = option(
        None,
        "Groups of channels in GroupNorm; base_channels / 4 if not given, at most the 32 of published models. "
        "With one channel to a group, coloured specks grow at fixed places.",
        low=1,
    )
    z_channels: int = option(256, "Channels between encoder and quantizer.", low=1)
    dropout: float = option(0.0, "Dropout inside residual blocks.", low=0.0, high=0.9)


@dataclass(frozen=True, kw_only=True)
class TokenizerTrainOptions(QuantizerTrainOptions):
    """How a tokenizer is trained.

    Schedules (`*_samples` and the temperature) count images seen, so they do not change with the batch size. `revive_every_steps`,
    `r1_every_steps` and the decays of moving averages (`weight_average_decay`, `codebook_decay`) count optimizer steps.
    """

    num_samples: int = option(1_000_000, "Images to train on.", low=1)
    global_batch_size: int = option(64, "Images per optimizer step over all workers.", low=1)
    learning_rate: float = option(1e-4, "Peak learning rate of both optimizers.", above=0.0)
    warmup_samples: int = option(0, "Images over which the learning rate rises from 0.", low=0)
    decay: Literal["cosine", "none"] = option("cosine", "Learning-rate schedule after the warm-up.")
    weight_average_decay: float = option(
        0.999, "Decay of the exponential average of the weights; 0 turns it off.", low=0.0, high=1.0
    )
    l1_weight: float = option(1.0, "Weight of the absolute pixel difference.", low=0.0)
    l2_weight: float = option(0.0, "Weight of the squared pixel difference.", low=0.0)
    perceptual_weight: float = option(
        0.0, "Weight of the perceptual distance (LPIPS, Zhang et al. 2018); needs perceptual_vgg.", low=0.0
    )
    perceptual_vgg: str | None = option(
        None,
        "VGG16 weights as torchvision publishes them, or a VQGAN checkpoint that holds them: a path, s3:// or https:// address.",
    )
    perceptual_vgg_sha256: str | None = option(
        None, "sha-256 of that file, or its first eight digits or more; an https:// address needs it."
    )
    perceptual_heads: str | None = option(
        None, "Linear heads of LPIPS (weights/v0.1/vgg.pth of the lpips package), where perceptual_vgg does not hold them."
    )
    perceptual_heads_sha256: str | None = option(
        None, "sha-256 of that file, or its first eight digits or more; an https:// address needs it."
    )
    discriminator_weight: float = option(
        0.0, "Weight of the adversarial term; 0 trains without a discriminator.", low=0.0
    )
    discriminator_loss: Literal["hinge", "vanilla", "non-saturating"] = option(
        "hinge", "hinge and vanilla: the generator's term is -mean D; non-saturating: mean softplus(-D)."
    )
    discriminator_channels: int = option(64, "Channels of the discriminator's first layer.", low=8)
    discriminator_layers: int = option(3, "Strided layers of the patch discriminator.", low=1, high=5)
    discriminator_start_samples: int = option(
        0, "The discriminator's term joins the generator's loss after so many images.", low=0
    )
    discriminator_warm_samples: int | None = option(
        None, "Images before that from which on the discriminator learns; from the first image if not given.", low=0
    )
    discriminator_ramp_samples: int = option(0, "Images over which that term rises to its full weight.", low=0)
    adaptive_weight: bool = option(True, "Scale the adversarial term by the ratio of last-layer gradients.")
    max_adaptive_weight: float = option(100.0, "Cap of that ratio.", above=0.0)
    lecam_weight: float = option(
        0.0, "Weight of the LeCam regularisation of the discriminator (Tseng et al. 2021); 0: none.", low=0.0
    )
    r1_weight: float = option(
        0.0, "Weight of the gradient penalty on real images (R1, Mescheder et al. 2018); 0: none.", low=0.0
    )
    r1_every_steps: int = option(16, "Steps between two such penalties, each weighted so many times.", low=1)
    grad_clip: float = option(1.0, "Largest gradient norm; 0 turns clipping off.", low=0.0)
    precision: Literal["fp32", "bf16"] = option("bf16", "bf16: autocast, with distances, norms and losses in fp32.")
    min_crop: float | None = option(
        None,
        "Random crops: the smallest side, as a share of the shorter side; at 1 only the place varies. The centred square if not given.",
        above=0.0,
        high=1.0,
    )
    random_flip: bool = option(True, "Mirror half of the images.")
    log_every_steps: int = option(50, "Steps between two log lines.", low=1)
    checkpoint_every_steps: int = option(500, "Steps between two commits.", low=1)
    keep_checkpoints: int = option(2, "Newest commits that are kept; the log stays whole.", low=1)
    spike_threshold: float = option(
        0.0,
        "A reconstruction loss so many robust standard deviations above the median of the steps before it is undone like NaN; "
        "0: only NaN and infinity are.",
        low=0.0,
    )
    skip_batches: int = option(16, "Global batches up to the offending one that are then left out.", low=1)
    max_rollbacks: int = option(
        3, "Times in a row, without a commit beyond the steps that failed, that a training goes back before it gives up.", low=0
    )
