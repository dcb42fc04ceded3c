"""Every option of the system, one frozen keyword-only dataclass per configuration section.

The text beside each field is its documentation: `docs/configuration.md` is made from it (`python -m stages.config`).
Only dataclasses live here, so that reading a configuration imports neither torch nor ray.
"""

from dataclasses import dataclass
from typing import Literal

from stages.evaluation_options import EvaluationOptions
from stages.nightly_options import NightlyOptions, SweepOptions
from stages.option import option
from stages.quantizer_options import QuantizerOptions, QuantizerTrainOptions
from stages.sampling_options import SamplingOptions


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """One training history of a transformer."""

    path: str = option("runs/default", "Folder of checkpoints, logs and records. Local or s3://.")
    seed: int = option(0, "Seeds weights, sample order, view choice, dropout and condition dropping.", low=0)


@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """Where images come from."""

    name: str = option("scenes", "A name from pipeline.sources.SOURCES, or `package.module:Class`.")
    path: str | None = option(None, "Folder, list file or Parquet files. Not needed by `scenes`.")
    num_images: int | None = option(None, "Use the first so many training images; all of them if not given.", low=1)
    seed: int = option(0, "Seed of generated sources (`scenes`) and of the holdout split.", low=0)
    split: Literal["train", "holdout"] = option("train", "Which images `tokenize` takes.")
    holdout_path: str | None = option(None, "Held-out images for evaluation, where the source has no split of its own.")
    holdout_fraction: float = option(
        0.0, "Without holdout_path: share of the images, chosen by hash, kept out of training.", low=0.0, high=0.9
    )
    num_holdout_images: int | None = option(
        None, "Use the first so many held-out images; all of them if not given.", low=1
    )


@dataclass(frozen=True, kw_only=True)
class ImageOptions:
    """What is done to an image before the tokenizer sees it. Part of the code dataset's identity."""

    size: int = option(256, "Side of the square image in pixels.", low=8)
    channels: Literal[1, 3] = option(3, "1 for grey, 3 for RGB.")
    crop: Literal["center"] = option("center", "center: shorter side to `size` with antialiasing, then the middle.")
    views: tuple[str, ...] = option(
        ("center",), "Views stored per image: center, flip, ten-crop[@ENLARGE], random-crop:N[@SHARE]."
    )


@dataclass(frozen=True, kw_only=True)
class TokenizerOptions(QuantizerOptions):
    """The VQGAN: its folder and, for training one, its architecture (reference: Esser et al. 2020, section 3.1)."""

    path: str = option("runs/tokenizer", "Folder of the tokenizer artefact.")
    input: str = option("image", "What is tokenized: image, or a condition map of the source, such as segmentation or depth.")
    num_labels: int | None = option(
        None, "A map of ids below this is seen one-hot, in so many channels; maps of numbers in [0, 1] are one channel.", low=2
    )
    base_channels: int = option(128, "Channels at full resolution; a multiple of 32 (GroupNorm has 32 groups).", low=32)
    channel_multipliers: tuple[int, ...] = option(
        (1, 1, 2, 2, 4), "Per level; each level but the last halves the image."
    )
    num_res_blocks: int = option(2, "Residual blocks per level.", low=1)
    attention_resolutions: tuple[int, ...] = option((16,), "Feature-map sides at which self-attention is used.")
    z_channels: int = option(256, "Channels between encoder and quantizer.", low=1)
    dropout: float = option(0.0, "Dropout inside residual blocks.", low=0.0, high=0.9)


@dataclass(frozen=True, kw_only=True)
class TokenizerTrainOptions(QuantizerTrainOptions):
    """How a tokenizer is trained. Schedules count images seen, so they do not change with the batch size."""

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
        3, "Times in a row, without a new commit, that a training goes back before it gives up.", low=0
    )


@dataclass(frozen=True, kw_only=True)
class CodesOptions:
    """The code dataset."""

    path: str = option("runs/codes", "Folder of the code dataset. Local or s3://.")
    shard_size: int = option(512, "Images per shard: what one task decodes, encodes and commits.", low=1)
    encode_batch_size: int = option(
        64, "Images per encoder call. Part of the identity: it can decide near ties.", low=1
    )
    encode_precision: Literal["fp32", "bf16"] = option("fp32", "fp32 is the parity mode. Part of the identity.")
    num_encoder_actors: int = option(1, "Encoders in the actor pool.", low=1)
    conditions: tuple[str, ...] = option(
        (), "Condition maps of the source stored per row on the code grid, 8 bits each, such as segmentation."
    )
    max_quarantined_fraction: float = option(
        0.01, "More unusable images than this share fail the job.", low=0.0, high=1.0
    )
    drop_duplicates: bool = option(
        False, "Leave out images whose bytes are those of an earlier one; they are reported either way."
    )
    remap_unused: bool = option(
        False,
        "Number the codebook entries that occur densely, so that fewer bits hold them; readers see the codes as ever.",
    )
    row_group_rows: int | None = option(
        None, "Rows per row group, a power of two; 16384, or fewer of large rows, if not given.", low=1
    )
    verify_on_open: bool = option(
        True,
        "Hash every file of the dataset before training starts. Row groups are checked as they are read either way.",
    )
    cache_path: str | None = option(
        None, "Local folder for row groups of a dataset on S3; the system's temporary folder if not given."
    )
    cache_bytes: int = option(64 << 30, "Row groups kept there at most by one process, per column.", low=1 << 20)


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """The decoder-only transformer. Vocabulary, sequence length and classes follow from the code dataset."""

    num_layers: int = option(12, "Blocks.", low=1)
    hidden_size: int = option(768, "Width.", low=8)
    num_heads: int = option(12, "Attention heads; hidden_size / num_heads must be a multiple of 4 (2-D RoPE).", low=1)
    ffn_size: int | None = option(
        None, "Width inside the feed-forward layer; 8/3 hidden_size rounded up to 64, or 4 hidden_size with gelu, if not given.", low=8
    )
    residual_dropout: float = option(0.1, "Dropout on what each branch adds.", low=0.0, high=0.9)
    embedding_dropout: float = option(0.1, "Dropout on the embedded codes.", low=0.0, high=0.9)
    qk_norm: bool = option(True, "RMS-normalise queries and keys per head.")
    rope_base: float = option(10000.0, "Base of the rotary frequencies.", above=1.0)
    norm: Literal["rms", "layer"] = option("rms", "RMSNorm, or LayerNorm as in GPT-2.")
    norm_eps: float = option(1e-6, "Added to the variance by the norms of blocks.", above=0.0)
    ffn: Literal["swiglu", "gelu"] = option("swiglu", "Feed-forward layer: gated, or GELU as in GPT-2.")
    positions: Literal["rope", "rope-zero-prefix", "learned"] = option(
        "rope", "2-D rotary; the same with queries and keys of the prefix set to 0, as LlamaGen has it; or a learned vector each."
    )
    bias: bool = option(False, "Linear layers of blocks add a bias.")


@dataclass(frozen=True, kw_only=True)
class ConditioningOptions:
    """What precedes the codes."""

    name: str = option(
        "class", "A name from stages.second_stage.conditioning.CONDITIONINGS, codes, or `package.module:Class`."
    )
    num_tokens: int = option(1, "Condition tokens per image; more than 1 with codes only.", low=1)
    cond_drop_prob: float = option(
        0.1, "Share of training rows whose condition is replaced by the null condition.", low=0.0, high=1.0
    )


@dataclass(frozen=True, kw_only=True)
class OptimOptions:
    """AdamW and its schedule for the transformer."""

    learning_rate: float = option(3e-4, "Peak learning rate.", above=0.0)
    betas: tuple[float, ...] = option((0.9, 0.95), "AdamW betas.")
    weight_decay: float = option(0.05, "On matrices only: norms, biases and embeddings are not decayed.", low=0.0)
    warmup_steps: int = option(100, "Steps over which the learning rate rises from 0.", low=0)
    warmup_samples: int | None = option(None, "The same in rows; takes the place of warmup_steps if given.", low=0)
    schedule: Literal["cosine", "constant", "wsd"] = option(
        "cosine", "After the warm-up; wsd: constant, then a linear decay at the end of the run."
    )
    decay_steps: int = option(1000, "Steps of the decay at the end of wsd.", low=1)
    decay_samples: int | None = option(None, "The same in rows; takes the place of decay_steps if given.", low=1)
    min_learning_rate_ratio: float = option(
        0.05, "Where cosine and wsd end, as a share of the peak.", low=0.0, high=1.0
    )
    grad_clip: float = option(1.0, "Largest gradient norm; 0 turns clipping off.", low=0.0)
    weight_average_decay: float = option(
        0.0, "Decay per step of the exponential average of the weights; 0 keeps none.", low=0.0, high=0.999999
    )


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """The transformer's training loop."""

    global_batch_size: int = option(256, "Rows per optimizer step over all workers.", low=1)
    micro_batch_size: int = option(32, "Rows per forward pass of one worker.", low=1)
    num_steps: int = option(10_000, "Optimizer steps of the whole run.", low=1)
    checkpoint_every_steps: int = option(1000, "Steps between two commits.", low=1)
    checkpoint_every_seconds: float | None = option(
        None, "Also commit when so much time has passed since the last commit.", above=0.0
    )
    shuffle_window: int | None = option(
        None,
        "Row groups shuffled together, for a dataset larger than the memory or cache near it; the whole dataset if not given.",
        low=1,
    )
    keep_checkpoints: int = option(3, "Newest commits that are kept; the log stays whole.", low=1)
    keep_every_steps: int | None = option(None, "Commits at multiples of so many steps are kept as well.", low=1)
    keep_best: int = option(0, "So many commits of the lowest validation NLL are kept as well.", low=0)
    validation_path: str | None = option(
        None, "Code dataset of held-out images (tokenize with source.split=holdout), measured at every commit."
    )
    validation_rows: int = option(1024, "Rows of it that are measured, from the first on.", low=1)
    log_every_steps: int = option(50, "Steps between two log lines.", low=1)
    precision: Literal["fp32", "bf16"] = option("bf16", "Compute precision of the transformer.")
    activation_checkpointing: bool = option(
        False, "Keep only the input of every block and compute the rest again: less memory, about a third more time."
    )
    spike_threshold: float = option(
        10.0,
        "A loss so many robust standard deviations above the median of the steps before it is undone like NaN; 0: only NaN is.",
        low=0.0,
    )
    skip_batches: int = option(16, "Global batches up to the offending one that are then left out.", low=1)
    max_rollbacks: int = option(
        3, "Times in a row, without a new commit, that a run goes back before it gives up.", low=0
    )
    deterministic: bool = option(False, "Refuse operations whose result is not bitwise reproducible.")


@dataclass(frozen=True, kw_only=True)
class DeepSpeedOptions:
    """DeepSpeed ZeRO."""

    zero_stage: Literal[0, 1, 2, 3] = option(
        1, "What is sharded: 1 optimizer state, 2 gradients too, 3 parameters too."
    )
    offload_optimizer: bool = option(False, "Keep the optimizer state in host memory; needs zero_stage of at least 1.")
    offload_parameters: bool = option(False, "Keep the parameters in host memory; needs zero_stage=3.")
    bucket_size: int = option(
        50_000_000, "Elements that one collective reduces or gathers at most; buffers grow with it.", low=1
    )


@dataclass(frozen=True, kw_only=True)
class ScalingOptions:
    """Workers of the two training jobs."""

    num_workers: int | tuple[int, ...] = option(
        1,
        "Training processes (world size). For `train` also [min, max]: the run shrinks and grows with the cluster.",
        low=1,
    )
    use_gpu: bool = option(False, "One GPU per worker.")
    cpus_per_worker: float = option(1.0, "CPUs that Ray reserves per worker.", above=0.0)
    threads_per_worker: int | None = option(
        None, "Torch threads per worker; an equal share of its machine if not given.", low=1
    )
    placement_strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = option(
        "PACK", "How Ray places the workers on nodes."
    )
    max_failures: int = option(
        3, "Times a job restarts its workers without a new commit in between before it gives up.", low=0
    )
    hang_timeout_seconds: float = option(
        600.0, "A worker that ends no step for so long is ended and counts as failed.", above=0.0
    )
    resize_every_seconds: float = option(
        60.0, "With num_workers=[min, max]: how often the cluster is looked at for more workers.", above=0.0
    )

    @property
    def min_workers(self) -> int:
        """Fewest processes a job runs with."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def max_workers(self) -> int:
        """Most processes a job runs with."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[-1]


@dataclass(frozen=True, kw_only=True)
class Config:
    """The whole configuration. Commands take the sections they need, never this."""

    run: RunOptions = RunOptions()
    source: SourceOptions = SourceOptions()
    images: ImageOptions = ImageOptions()
    tokenizer: TokenizerOptions = TokenizerOptions()
    tokenizer_train: TokenizerTrainOptions = TokenizerTrainOptions()
    codes: CodesOptions = CodesOptions()
    model: ModelOptions = ModelOptions()
    conditioning: ConditioningOptions = ConditioningOptions()
    optim: OptimOptions = OptimOptions()
    train: TrainOptions = TrainOptions()
    deepspeed: DeepSpeedOptions = DeepSpeedOptions()
    scaling: ScalingOptions = ScalingOptions()
    sampling: SamplingOptions = SamplingOptions()
    evaluation: EvaluationOptions = EvaluationOptions()
    nightly: NightlyOptions = NightlyOptions()
    sweep: SweepOptions = SweepOptions()
