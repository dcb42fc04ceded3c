"""Proves a run: its commits verify, and the rows every step consumed are those its code dataset prescribes."""

import numpy as np

from cluster import checkpoints, run_log
from pipeline.code_dataset import CodeDataset
from pipeline.loader import dataset_order
from pipeline.order import SampleOrder, batch_index, rows_digest
from stages.errors import ArtefactError


def verify_run(run_path: str) -> list[str]:
    """Problems of a run; empty when every commit verifies and the sample log follows from the code dataset."""
    commits = checkpoints.list_commits(run_path)
    if not commits:
        return [f"{run_path} has no committed checkpoint"]
    problems = [problem for commit in commits for problem in checkpoints.commit_problems(commit)]
    return problems if commits[-1].is_imported else problems + _log_problems(run_path, commits[-1])


def _log_problems(run_path: str, commit: checkpoints.Commit) -> list[str]:
    try:
        records = run_log.read_log(run_path, commit.content["log"])
        dataset = CodeDataset.open(commit.content["codes_path"], verify=False)
    except ArtefactError as error:
        return [str(error)]
    if dataset.root_hash != commit.root_hash:
        return [
            f"{dataset.path} has root hash {dataset.root_hash}, but {commit.path} was trained on {commit.root_hash}"
        ]
    if [record["step"] for record in records] != list(range(commit.step)):
        return [f"The log of {run_path} does not hold every step from 0 to {commit.step - 1} once"]
    if run_log.chain(run_log.EMPTY_HASH, records) != commit.content["sample_log_hash"]:
        return [f"The log of {run_path} does not give the sample-log hash of {commit.path}"]
    sampler = commit.content["sampler"]
    order = dataset_order(
        dataset,
        seed=sampler["seed"],
        global_batch_size=sampler["global_batch_size"],
        window_groups=sampler["window"],
    )
    return [
        f"Step {record['step']} of {run_path} consumed other rows than its code dataset prescribes"
        for record in records
        if run_log.global_digest(record) != _prescribed_digest(order, batch_index(record["step"], sampler["skipped"]))
    ]


def _prescribed_digest(order: SampleOrder, index: int) -> int:
    batch = order.batch(index)
    positions = np.flatnonzero(batch.valid)
    return rows_digest(index, positions, batch.rows[positions])
