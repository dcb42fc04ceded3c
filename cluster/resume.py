"""From a commit back to an engine: whether a job may go on from it, and loading it, also at another world size or ZeRO stage."""

import logging
import os
import re
import shutil
from collections.abc import Callable, Collection
from typing import Any

import torch.distributed as dist

from cluster import checkpoints, universal
from cluster.checkpoints import AVERAGES, SHARDS, WEIGHTS
from cluster.deepspeed_engine import load_shards
from cluster.node_folder import fetched, node_folder
from cluster.train_options import TrainJobOptions
from pipeline import storage
from pipeline.binding import encoding_of
from pipeline.code_dataset import CodeDataset
from pipeline.condition_codes import ConditionCodes
from pipeline.order import SAMPLER_VERSION
from stages.config import to_dict
from stages.errors import ArtefactError
from stages.second_stage.transformer import TransformerConfig

logger = logging.getLogger(__name__)

UNIVERSAL = "universal"  # folder of a converted checkpoint


def commit_facts(
    options: TrainJobOptions,
    dataset: CodeDataset,
    conditions: ConditionCodes | None,
    config: TransformerConfig,
    world_size: int,
) -> dict[str, Any]:
    """What every commit of a run says of what it was made from and with; `check_resumable` and readers of checkpoints ask for it."""
    return {
        "codes_path": options.codes.path,
        "root_hash": dataset.root_hash,
        "tokenizer_fingerprint": dataset.tokenizer_fingerprint,
        "encoding": encoding_of(dataset.manifest),
        "conditions": _condition_facts(conditions),
        "world_size": world_size,
        "zero_stage": options.deepspeed.zero_stage,
        "precision": options.train.precision,
        "sampler": {
            "version": SAMPLER_VERSION,
            "seed": options.run.seed,
            "global_batch_size": options.train.global_batch_size,
            "window": options.train.shuffle_window,
        },
        "transformer": to_dict(config),
        "options": to_dict(options),
    }


def _condition_facts(conditions: ConditionCodes | None) -> dict[str, str] | None:
    """Which codes a run is conditioned on."""
    if conditions is None:
        return None
    dataset = conditions.dataset
    return {"root_hash": dataset.root_hash, "tokenizer_fingerprint": dataset.tokenizer_fingerprint}


def check_resumable(
    commit: checkpoints.Commit,
    options: TrainJobOptions,
    dataset: CodeDataset,
    conditions: ConditionCodes | None,
    config: TransformerConfig,
) -> None:
    """Refuses a commit that a job cannot continue exactly. World size and ZeRO stage may differ.

    Raises:
        ArtefactError: another code dataset, model, order or precision, or an average that starts or ends midway; both sides are named.
    """
    if commit.is_imported:
        _check_imported(commit, dataset, conditions, config)
        return
    content, ours = commit.content, to_dict(config)
    run, train = options.run, options.train
    sampler = content["sampler"]
    pairs = [
        ("codes.path", "code dataset", content["root_hash"], dataset.root_hash),
        ("conditioning.codes_path", "conditions", content.get("conditions"), _condition_facts(conditions)),
        ("run.seed", "seed", sampler["seed"], run.seed),
        ("train.global_batch_size", "global batch size", sampler["global_batch_size"], train.global_batch_size),
        ("Tessera", "sampler version", sampler.get("version"), SAMPLER_VERSION),
        ("train.shuffle_window", "window", sampler["window"], train.shuffle_window),
        ("train.precision", "precision", content["precision"], train.precision),
        (
            "optim.weight_average_decay",
            "averaged weights",
            commit.has(AVERAGES),
            options.optim.weight_average_decay > 0,
        ),
    ]
    pairs += [("model", f"transformer {name}", value, ours.get(name)) for name, value in content["transformer"].items()]
    for key, what, saved, asked in pairs:
        if saved != asked:
            raise ArtefactError(
                f"{key} gives {what} {asked}, but the run at {run.path} was trained to step {commit.step} with {saved}. "
                f"Use the same value, or another run.path."
            )


def _check_imported(
    commit: checkpoints.Commit, dataset: CodeDataset, conditions: ConditionCodes | None, config: TransformerConfig
) -> None:
    """Refuses datasets of other tokenizers, grids or numbers of classes, or another model, than an imported transformer's."""
    saved, ours = commit.content["transformer"], to_dict(config)
    if saved["conditioning"] == "none":  # labels, if the dataset has them, make no difference
        saved = {**saved, "num_classes": ours["num_classes"]}
    pairs: list[tuple[str, str, Any, Any]]
    pairs = [("codes.path", "tokenizer", commit.tokenizer_fingerprint, dataset.tokenizer_fingerprint)]
    known, ours_of = commit.content.get("conditions"), _condition_facts(conditions)
    if known is not None and ours_of is not None:
        fingerprints = (known["tokenizer_fingerprint"], ours_of["tokenizer_fingerprint"])
        pairs.append(("conditioning.codes_path", "tokenizer", *fingerprints))
    names = {name: "codes.path" for name in ("codebook_size", "grid", "num_classes")}
    if conditions is not None:
        names["num_classes"] = "conditioning.codes_path"
    names |= {"conditioning": "conditioning.name", "num_prefix_tokens": "conditioning.codes_path"}
    pairs += [(names.get(name, "model"), name, value, ours.get(name)) for name, value in saved.items()]
    for key, what, there, here in pairs:
        if there != here:
            raise ArtefactError(
                f"{key} gives {what} {here}, but the imported transformer in {commit.path} has {there}. Tokenize with its tokenizer "
                "and image size, and give the configuration beside it (model.yaml) with -c."
            )


def load_commit(engine: Any, commit: checkpoints.Commit, keep_alive: Callable[[], None]) -> None:
    """Brings an engine to the state of a commit. Every rank must call it.

    Args:
        engine: DeepSpeed's.
        commit: the checkpoint.
        keep_alive: called while it is fetched and converted, as long as all ranks live.

    Raises:
        ArtefactError: DeepSpeed finds no state in it, or cannot convert it to this world size and ZeRO stage.
    """
    device = engine.device
    if commit.is_imported:
        with fetched(commit, lambda ranks: [WEIGHTS], device, keep_alive) as folder:
            universal.load_weights(engine, os.path.join(folder, WEIGHTS))
        return
    saved = (commit.content["world_size"], commit.content["zero_stage"])
    ours = (dist.get_world_size(), engine.zero_optimization_stage())
    if saved == ours or saved[1] == ours[1] == 0:
        with fetched(commit, lambda ranks: read_on(commit, ranks), device, keep_alive) as folder:
            loaded = load_shards(engine, folder, SHARDS)
        if not loaded:
            raise ArtefactError(
                f"{commit.path} holds no optimizer state that DeepSpeed can load. Use another checkpoint."
            )
        return
    logger.info("Converting %s from world size %d and ZeRO stage %d to %d and %d", commit.path, *saved, *ours)
    with node_folder(lambda folder, ranks: _make_universal(commit, folder), device, keep_alive) as folder:
        source = _source(commit, folder)
        averages = os.path.join(source, AVERAGES) if commit.has(AVERAGES) else None
        weights, converted = os.path.join(source, WEIGHTS), os.path.join(folder, UNIVERSAL)
        universal.load(engine, converted, step=commit.step, weights=weights, averages=averages)


def read_on(commit: checkpoints.Commit, ranks: Collection[int]) -> list[str]:
    """The files that DeepSpeed reads on these ranks: those of the model, and of its shards their own."""
    names = [entry["path"] for entry in commit.content["files"] if entry["path"].startswith(f"{SHARDS}/")]
    owners = [(name, re.search(r"pp_rank_(\d+)_", name)) for name in names]
    return [name for name, owner in owners if owner is None or int(owner[1]) in ranks]


def _source(commit: checkpoints.Commit, folder: str) -> str:
    """Where a commit's own files are while it is converted in `folder`."""
    return commit.path if storage.is_local(commit.path) else os.path.join(folder, "checkpoint")


def _make_universal(commit: checkpoints.Commit, folder: str) -> None:
    source = _source(commit, folder)
    shards = os.path.join(source, SHARDS)
    if source != commit.path:
        checkpoints.download(commit, source)
    universal.convert(shards, commit.content["zero_stage"], os.path.join(folder, UNIVERSAL))
    if source != commit.path:
        shutil.rmtree(shards)
