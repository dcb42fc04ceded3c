"""Tiny objects that several test files use."""

import numpy as np

from pipeline.code_dataset.parts import PartRows
from pipeline.code_dataset.plan import freeze, make_plan
from pipeline.code_dataset.publish import publish
from pipeline.code_dataset.receipts import commit_shard
from pipeline.sources import listing
from stages.config import build
from stages.first_stage.tokenizer import TokenizerConfig
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


def publish_codes(root, *, num_images=22, num_views=2, num_classes=3, seed=0, fingerprint="f" * 64):
    """A published code dataset of random codes (4 x 4, 32 entries) as the writer makes it, without images or a tokenizer."""
    random = np.random.default_rng(seed)
    views = ["center", "flip"][:num_views]
    classes = [f"class {i}" for i in range(num_classes)]
    identity = {"views": views, "class_names": classes}
    listed = listing(np.arange(num_images), [f"u{i}" for i in range(num_images)], np.arange(num_images) % max(1, num_classes))
    plan = make_plan(listed, identity, shard_size=num_images)
    freeze(root, plan)
    rows = PartRows(
        codes=random.integers(0, 32, (num_images * num_views, 16)),
        image_ids=np.arange(num_images).repeat(num_views),
        views=np.tile(np.arange(num_views, dtype=np.int32), num_images),
        labels=(np.arange(num_images) % num_classes).astype(np.int32).repeat(num_views) if num_classes else None,
    )
    receipt = commit_shard(root, plan.fingerprint, 0, rows=rows, quarantined=[], codebook_size=32, num_views=num_views)
    description = {
        "plan_fp": plan.fingerprint,
        "source": {"name": "random", "n_input": num_images},
        "class_names": classes,
        "views": views,
        "grid": [4, 4],
        "tokenizer": {"fingerprint": fingerprint},
        "preprocess": {},
        "encode": {},
        "codec": {"name": "pack_le", "bits": 5, "bytes_per_row": 10, "num_codes": 16, "codebook_size": 32},
    }
    publish(root, [receipt], description)
    return root
