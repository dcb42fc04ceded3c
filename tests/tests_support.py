"""Tiny objects that several test files use."""

import functools
import itertools
import os
import signal
from typing import Any

from stages.config import build
from stages.first_stage.tokenizer_config import TokenizerConfig
from stages.options import Config

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


def tiny_config(folder, **sections):
    """A whole configuration so small that each command takes seconds; paths under `folder`, sections merged on top."""
    base = {
        "run": {"path": f"{folder}/run"},
        "source": {"name": "scenes", "num_images": 60, "num_holdout_images": 24},
        "images": {"size": 16, "views": ["center", "flip"]},
        "tokenizer": {
            "path": f"{folder}/tokenizer",
            "codebook_size": 32,
            "codebook_dim": 4,
            "base_channels": 32,
            "channel_multipliers": [1, 2],
            "num_res_blocks": 1,
            "attention_resolutions": [],
            "z_channels": 16,
        },
        "tokenizer_train": {
            "num_samples": 64,
            "global_batch_size": 16,
            "discriminator_weight": 0.1,
            "discriminator_channels": 8,
            "discriminator_layers": 1,
            "log_every_steps": 2,
            "checkpoint_every_steps": 2,
        },
        "codes": {"path": f"{folder}/codes", "shard_size": 20, "encode_batch_size": 20},
        "model": {"num_layers": 1, "hidden_size": 32, "num_heads": 2},
        "optim": {"warmup_steps": 2, "schedule": "constant"},
        "train": {
            "global_batch_size": 16,
            "micro_batch_size": 4,
            "num_steps": 6,
            "checkpoint_every_steps": 3,
            "precision": "fp32",
            "deterministic": True,
        },
        "scaling": {"cpus_per_worker": 0.5},
        "sampling": {"path": f"{folder}/samples", "num_samples": 6, "group_size": 4, "top_k": 16},
        "evaluation": {
            "path": f"{folder}/evaluation",
            "num_samples": 24,
            "num_blocks": 4,
            "num_reference_images": 40,
            "extractor_resolution": 32,
            "num_grid_images": 10,
        },
    }
    return build(Config, {name: {**base.get(name, {}), **sections.get(name, {})} for name in {**base, **sections}})


def kill_at_call(owner: Any, name: str, number: int, *, is_after: bool) -> None:
    """Makes this process kill itself at the so-many-th call of a function: before it, or after it."""
    call, numbers = getattr(owner, name), itertools.count(1)

    @functools.wraps(call)
    def deadly(*args: Any, **kwargs: Any) -> Any:
        if next(numbers) == number:
            if is_after:
                call(*args, **kwargs)
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*args, **kwargs)

    setattr(owner, name, deadly)
