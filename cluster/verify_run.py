"""Proves a run of either stage: its commits verify, and the rows every step consumed are those that its data prescribe."""

import logging
from collections.abc import Callable

import numpy as np

from cluster import checkpoints, run_log
from cluster.tokenizer_history import list_training_images
from cluster.tokenizer_options import TokenizerJobOptions
from pipeline.code_dataset import CodeDataset
from pipeline.image_order import ImageOrder, list_hash
from pipeline.loader import dataset_order
from pipeline.order import batch_index, rows_digest
from stages.config import build
from stages.errors import ArtefactError, TesseraError

logger = logging.getLogger(__name__)

Prescribed = Callable[[int], int]  # digest of the rows of a global batch


def verify_run(run_path: str) -> list[str]:
    """Problems of a run, or of a tokenizer's training; empty when every commit verifies and the sample log follows from its data."""
    problems: list[str] = []
    commits = checkpoints.list_commits(run_path, problems)
    if not commits:
        return problems or [f"{run_path} has no committed checkpoint"]
    for commit in commits:
        found = checkpoints.commit_problems(commit)
        if checkpoints.is_there(commit):
            problems += found
    return problems if commits[-1].is_imported else problems + _log_problems(run_path, commits[-1])


def _log_problems(run_path: str, commit: checkpoints.Commit) -> list[str]:
    is_tokenizer = "list_hash" in commit.content["sampler"]
    try:
        records = run_log.read_log(run_path, commit.content["log"])
        prescribed = _images_prescribe(commit) if is_tokenizer else _codes_prescribe(commit)
    except ArtefactError as error:
        return [str(error)]
    if [record["step"] for record in records] != list(range(commit.step)):
        return [f"The log of {run_path} does not hold every step from 0 to {commit.step - 1} once"]
    if run_log.chain(run_log.EMPTY_HASH, records) != commit.content["sample_log_hash"]:
        return [f"The log of {run_path} does not give the sample-log hash of {commit.path}"]
    data, skipped = "images" if is_tokenizer else "code dataset", commit.content["sampler"]["skipped"]
    return [
        f"Step {record['step']} of {run_path} consumed other rows than its {data} prescribes"
        for record in records
        if run_log.global_digest(record) != prescribed(batch_index(record["step"], skipped))
    ]


def _codes_prescribe(commit: checkpoints.Commit) -> Prescribed:
    dataset, sampler = CodeDataset.open(commit.content["codes_path"], verify=False), commit.content["sampler"]
    if dataset.root_hash != commit.root_hash:
        raise ArtefactError(
            f"{dataset.path} has root hash {dataset.root_hash}, but {commit.path} was trained on {commit.root_hash}"
        )
    order = dataset_order(
        dataset,
        seed=sampler["seed"],
        global_batch_size=sampler["global_batch_size"],
        window_groups=sampler["window"],
    )

    def prescribed(index: int) -> int:
        batch = order.batch(index)
        positions = np.flatnonzero(batch.valid)
        return rows_digest(index, positions, batch.rows[positions])

    return prescribed


def _images_prescribe(commit: checkpoints.Commit) -> Prescribed:
    sampler = commit.content["sampler"]
    found = _listed_hash(commit)
    if found not in (None, sampler["list_hash"]):
        raise ArtefactError(f"The images have list hash {found}, but {commit.path} was trained on {sampler['list_hash']}")
    order = ImageOrder(**{name: sampler[name] for name in ("list_hash", "num_images", "seed", "global_batch_size")})
    return lambda index: rows_digest(index, np.arange(order.global_batch_size), order.batch(index).rows)


def _listed_hash(commit: checkpoints.Commit) -> str | None:
    """Hash of the image list as it is now; None where the images are not at hand, for a proof of the sequence needs none of them."""
    options = build(TokenizerJobOptions, commit.content["options"])
    try:
        return list_hash(list_training_images(options))
    except (TesseraError, OSError) as error:
        logger.warning("The image list is not compared with that of the training: %s", error)
        return None
