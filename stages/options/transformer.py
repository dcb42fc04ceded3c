"""Options of the second stage: the transformer and its training."""

from dataclasses import dataclass
from typing import Literal

from stages.options.declare import option


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """One training history of a transformer."""

    path: str = option("runs/default", "Folder of checkpoints, logs and records. Local or s3://.")
    seed: int = option(0, "Seeds weights, sample order, view choice, dropout and condition dropping.", low=0)


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """The decoder-only transformer. Vocabulary, sequence length and classes follow from the code dataset."""

    num_layers: int = option(12, "Blocks.", low=1)
    hidden_size: int = option(768, "Width.", low=8)
    num_heads: int = option(12, "Attention heads; hidden_size / num_heads must be a multiple of 4 (2-D RoPE).", low=1)
    ffn_size: int | None = option(
        None,
        "Width inside the feed-forward layer; 8/3 hidden_size rounded up to 64, or 4 hidden_size with gelu, if not given.",
        low=8,
    )
    residual_dropout: float = option(0.1, "Dropout on what each branch adds.", low=0.0, high=0.9)
    embedding_dropout: float = option(0.1, "Dropout on the embedded codes.", low=0.0, high=0.9)
    qk_norm: bool = option(True, "RMS-normalise queries and keys per head.")
    rope_base: float = option(10000.0, "Base of the rotary frequencies.", above=1.0)
    norm: Literal["rms", "layer"] = option("rms", "RMSNorm, or LayerNorm as in GPT-2.")
    norm_eps: float = option(1e-6, "Added to the variance by the norms of blocks.", above=0.0)
    ffn: Literal["swiglu", "gelu"] = option("swiglu", "Feed-forward layer: gated, or GELU as in GPT-2.")
    positions: Literal["rope", "rope-zero-prefix", "learned"] = option(
        "rope",
        "2-D rotary; the same with queries and keys of the prefix set to 0, as LlamaGen has it; or a learned vector each.",
    )
    bias: bool = option(False, "Linear layers of blocks add a bias.")


@dataclass(frozen=True, kw_only=True)
class ConditioningOptions:
    """What precedes the codes."""

    name: str = option(
        "class", "A name from stages.second_stage.conditioning.CONDITIONINGS, or `package.module:Class`."
    )
    num_tokens: int | None = option(
        None, "With name codes: condition tokens per image; those of the code dataset of conditions if not given.", low=1
    )
    codes_path: str | None = option(
        None, "With name codes: code dataset of the conditions, of the same images and views as codes.path."
    )
    validation_codes_path: str | None = option(
        None, "The same for the images of train.validation_path. `sample` and `evaluate` draw for these where it is given."
    )
    cond_drop_prob: float = option(
        0.1, "Share of training rows whose condition is replaced by the null condition.", low=0.0, high=1.0
    )

    @property
    def sampled_codes_path(self) -> str | None:
        """Code dataset of the conditions that samples are drawn for: those that no training saw, if there are any."""
        return self.validation_codes_path or self.codes_path


@dataclass(frozen=True, kw_only=True)
class OptimOptions:
    """AdamW and its schedule for the transformer."""

    learning_rate: float = option(3e-4, "Peak learning rate.", above=0.0)
    betas: tuple[float, ...] = option((0.9, 0.95), "AdamW betas.", low=0.0, below=1.0)
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
    compile: bool | None = option(
        None, "Compile the blocks with torch.compile; if not given, on GPUs unless ZeRO-3 gathers weights in between."
    )
    spike_threshold: float = option(
        10.0,
        "A loss so many robust standard deviations above the median of the steps before it is undone like NaN; 0: only NaN is.",
        low=0.0,
    )
    skip_batches: int = option(16, "Global batches up to the offending one that are then left out.", low=1)
    max_rollbacks: int = option(
        3, "Times in a row, without a commit beyond the steps that failed, that a run goes back before it gives up.", low=0
    )
    deterministic: bool = option(False, "Refuse operations whose result is not bitwise reproducible.")
