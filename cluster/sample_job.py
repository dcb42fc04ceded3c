"""The `sample` job: draws samples on an actor and stores them by global index."""

import io
import logging
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import ray

from cluster import checkpoints
from cluster.runtime import user_errors
from cluster.sampler_actor import SamplerActor, warn_of_guidance
from pipeline import storage
from pipeline.grids import grid_png
from pipeline.progress import Progress
from pipeline.shard_jobs import share_per_actor
from stages.config import to_yaml
from stages.options import ConditioningOptions, RunOptions, SamplingOptions, TokenizerOptions

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SampleJobOptions:
    """The sections that `sample` takes, and the checkpoint: a path or "latest"."""

    run: RunOptions
    tokenizer: TokenizerOptions
    conditioning: ConditioningOptions
    sampling: SamplingOptions
    checkpoint: str = "latest"


@dataclass(frozen=True, kw_only=True)
class SampleSummary:
    """What `sample` reports."""

    samples: str
    num_samples: int
    checkpoint: str


def sample(options: SampleJobOptions) -> SampleSummary:
    """Draws `sampling.num_samples` samples and writes them as samples.npz and grid.png. Ray must be connected.

    samples.npz holds images uint8 (n, H, W, C), codes int64 (n, L) and labels int64, classes (n,) or codes of the
    condition (n, P), in order of the global sample index; and as text what they were drawn from: checkpoint_hash,
    the sha-256 of its COMMIT.json, and tokenizer_fingerprint. config.yaml names the checkpoint's folder.
    """
    commit = checkpoints.resolve_checkpoint(options.checkpoint, options.run.path, checkpoints.SAMPLED_FROM)
    warn_of_guidance(commit, options.sampling)
    on_one = ray.remote(num_cpus=1, num_gpus=share_per_actor("GPU", 1))
    actor: Any = on_one(SamplerActor).remote(
        commit.path, options.tokenizer.path, options.sampling, conditions_path=options.conditioning.sampled_codes_path
    )
    size = options.sampling.group_size
    num_samples = options.sampling.num_samples
    images, codes = [], []
    progress = Progress("samples", num_samples, logger)
    with user_errors():
        labels = ray.get(actor.labels.remote(0, num_samples))
        for start in range(0, num_samples, size):
            stop = min(start + size, num_samples)
            drawn = ray.get(actor.images_and_codes.remote(start, stop))
            images.append(drawn[0])
            codes.append(drawn[1])
            progress.advance(stop - start)
    all_images = np.concatenate(images)
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer,
        images=all_images,
        codes=np.concatenate(codes),
        labels=labels,
        checkpoint_hash=commit.hash,
        tokenizer_fingerprint=commit.tokenizer_fingerprint,
    )
    path = options.sampling.path
    storage.replace(storage.join(path, "samples.npz"), buffer.getvalue())
    storage.replace(storage.join(path, "grid.png"), grid_png(all_images))
    storage.replace(storage.join(path, "config.yaml"), to_yaml(replace(options, checkpoint=commit.path)).encode())
    ray.kill(actor)
    return SampleSummary(samples=path, num_samples=num_samples, checkpoint=commit.path)
