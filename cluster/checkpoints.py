"""Checkpoints that are whole or absent.

A checkpoint is a folder unique to one attempt, `checkpoints/step-000001000-<attempt>/`, and exists once its COMMIT.json does. The
commit is written last, put-if-absent, and lists every file with size and hash. "Latest" is the highest step whose files verify, all of
them or those that are needed: neither DeepSpeed's `latest` file nor a Ray report is asked.
"""

import hashlib
import json
import logging
import os
import tempfile
import time
import uuid
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import xxhash

from pipeline import storage
from stages.errors import ArtefactError

logger = logging.getLogger(__name__)

COMMIT = "COMMIT.json"
DAMAGED = "DAMAGED.json"  # name of the commit file of a checkpoint that a run passed over
WEIGHTS, AVERAGES = "transformer.safetensors", "transformer-average.safetensors"  # of a second-stage checkpoint
SAMPLED_FROM = (WEIGHTS, AVERAGES)
SHARDS = "deepspeed"  # folder of what DeepSpeed saves
FORMAT = "tessera-checkpoint"
FORMAT_VERSION = 1
NUM_HASHERS = 8  # a store gives one reader a part of what it has


@dataclass(frozen=True)
class Commit:
    """One committed checkpoint: its folder, what COMMIT.json says, and that file's sha-256."""

    path: str
    content: dict[str, Any]
    hash: str

    @property
    def step(self) -> int:
        return self.content["step"]

    @property
    def is_imported(self) -> bool:
        """Whether it holds another project's weights and nothing else."""
        return "imported" in self.content

    @property
    def root_hash(self) -> str | None:
        """Root hash of the code dataset it was trained on; None of an imported one."""
        return self.content["root_hash"]

    @property
    def tokenizer_fingerprint(self) -> str:
        return self.content["tokenizer_fingerprint"]

    @property
    def train_loss(self) -> float | None:
        """Loss of the last step, in nats per code; None of an imported one."""
        return self.content["train_loss"]

    def has(self, name: str) -> bool:
        """Whether the checkpoint holds a file of this name."""
        return any(entry["path"] == name for entry in self.content["files"])

    @property
    def validation_nll(self) -> float | None:
        """Nats per code of the held-out images, if they were measured."""
        return self.content.get("measured", {}).get("validation_nll")


def new_attempt() -> str:
    """A name no other attempt has."""
    return uuid.uuid4().hex[:12]


def checkpoint_path(run_path: str, step: int, attempt: str) -> str:
    """Folder of one attempt at the checkpoint after `step` steps."""
    return storage.join(run_path, "checkpoints", f"step-{step:09d}-{attempt}")


def file_entry(path: str, name: str) -> dict[str, Any]:
    """Size and hash of one file, under the name the commit lists it by. Raises FileNotFoundError."""
    return data_entry(storage.read_chunks(path), name)


def data_entry(chunks: Iterable[bytes], name: str) -> dict[str, Any]:
    """Like `file_entry`, of a file's contents."""
    digest, num_bytes = xxhash.xxh3_128(), 0
    for chunk in chunks:
        digest.update(chunk)
        num_bytes += len(chunk)
    return {"path": name, "bytes": num_bytes, "xxh3_128": digest.hexdigest()}


def write_commit(folder: str, content: dict[str, Any]) -> Commit:
    """Makes the checkpoint in `folder` exist.

    Raises:
        ArtefactError: the folder already has a commit, which an attempt-unique folder never has.
    """
    content = {"format": FORMAT, "format_version": FORMAT_VERSION, "created_at": time.time(), **content}
    content["sha256"] = _content_hash(content)
    data = json.dumps(content, indent=1).encode()
    if not storage.put_if_absent(storage.join(folder, COMMIT), data):
        raise ArtefactError(
            f"{folder} is committed already, but every attempt has a folder of its own. Remove the folder and resume."
        )
    return Commit(folder, content, hashlib.sha256(data).hexdigest())


def _content_hash(content: dict[str, Any]) -> str:
    """sha-256 of all that COMMIT.json says beside this hash."""
    rest = {name: value for name, value in content.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(rest).encode()).hexdigest()


def open_commit(folder: str) -> Commit:
    """The commit of a checkpoint folder, its files unchecked.

    Raises:
        ArtefactError: there is none, or it is not one.
    """
    try:
        return _read_commit(folder)
    except FileNotFoundError:
        raise ArtefactError(
            f"checkpoint is {folder}, but there is no {COMMIT} in it. Name a committed checkpoint."
        ) from None


class _DamagedCommit(ArtefactError):
    """A COMMIT.json that is not what was written."""


def _read_commit(folder: str) -> Commit:
    path = storage.join(folder, COMMIT)
    data = storage.read_bytes(path)
    try:
        content = json.loads(data)
    except ValueError as error:
        raise _DamagedCommit(f"{path} is damaged ({error}), but it must be JSON. Use another checkpoint.") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise _DamagedCommit(f"{path} is damaged: it is not a commit. Use another checkpoint.")
    found = _content_hash(content)
    if content.get("sha256", found) != found:  # it is optional
        raise _DamagedCommit(f"{path} is damaged: its sha-256 is not {content['sha256']}. Use another checkpoint.")
    if content.get("format_version") != FORMAT_VERSION:
        raise ArtefactError(
            f"{path} is not a checkpoint of format version {FORMAT_VERSION}, but it must be. Use another checkpoint."
        )
    return Commit(folder, content, hashlib.sha256(data).hexdigest())


def commit_problems(commit: Commit, names: Collection[str] | None = None) -> list[str]:
    """What is wrong with the files of a commit, or those of certain names: missing, of another size, or of another hash. Empty when they
    verify."""
    entries = [entry for entry in commit.content["files"] if names is None or entry["path"] in names]
    with ThreadPoolExecutor(NUM_HASHERS) as pool:
        found = pool.map(lambda entry: _file_problem(commit.path, entry), entries)
        return [problem for problem in found if problem is not None]


def _file_problem(folder: str, entry: dict[str, Any]) -> str | None:
    path = storage.join(folder, entry["path"])
    try:
        found = file_entry(path, entry["path"])
    except FileNotFoundError:
        return f"{path} is missing"
    if found == entry:
        return None
    return f"{path} has {found['bytes']} bytes and hash {found['xxh3_128']}, expected {entry['bytes']} and {entry['xxh3_128']}"


def is_there(commit: Commit) -> bool:
    """Whether the checkpoint exists: a training job prunes while others read."""
    return storage.exists(storage.join(commit.path, COMMIT))


def list_commits(run_path: str, problems: list[str] | None = None) -> list[Commit]:
    """Every committed checkpoint of a run in order of step, files unchecked. One damaged COMMIT.json does not hide the others.

    Args:
        run_path: of the run.
        problems: gets what is wrong with damaged ones; logged in any case.

    Raises:
        ArtefactError: one is of another format version; or all are damaged, and that is not what is asked for.
    """
    commits, damaged = [], []
    for path in storage.list_files(storage.join(run_path, "checkpoints"), suffix=COMMIT):
        try:
            commits.append(_read_commit(path[: -len(COMMIT) - 1]))
        except FileNotFoundError:  # pruned by the training job since it was listed
            pass
        except _DamagedCommit as error:
            logger.error("%s", error)
            damaged.append(str(error))
    if problems is not None:
        problems += damaged
    elif damaged and not commits:
        raise _all_damaged(run_path)
    return sorted(commits, key=_age)


def newest_commit(run_path: str) -> Commit | None:
    """The commit of the highest step, its files unchecked; None when there is none."""
    commits = list_commits(run_path)
    return commits[-1] if commits else None


def latest_commit(run_path: str, names: Collection[str] | None = None) -> Commit | None:
    """The highest step whose files verify, or those of certain names; damaged ones are named in the log and passed over. None when there is
    no commit.

    Raises:
        ArtefactError: all are damaged.
    """
    commits = list_commits(run_path)
    for commit in reversed(commits):
        problems = commit_problems(commit, names)
        if not problems:
            return commit
        if not is_there(commit):  # pruned since it was listed, for a newer one
            return latest_commit(run_path, names)
        logger.warning("Checkpoint %s is damaged and passed over: %s", commit.path, "; ".join(problems))
    if commits:
        raise _all_damaged(run_path)
    return None


def _all_damaged(run_path: str) -> ArtefactError:
    return ArtefactError(
        f"The checkpoints of {run_path} are all damaged; the log says how. Restore one; a training can start anew in another folder."
    )


def resolve_checkpoint(checkpoint: str, run_path: str, names: Collection[str] | None = None) -> Commit:
    """The commit named by a path, or the run's latest for "latest".

    Args:
        checkpoint: a folder, or "latest".
        run_path: of the run.
        names: of the files that are needed, such as SAMPLED_FROM, which leaves out the optimizer's many bytes; all if not given.

    Raises:
        ArtefactError: there is none, or its files do not verify.
    """
    if checkpoint == "latest":
        commit = latest_commit(run_path, names)
        if commit is None:
            raise ArtefactError(f"run.path is {run_path}, but it has no committed checkpoint. Run train first.")
        _check_kind(commit, names)
        return commit
    return open_verified(checkpoint, names)


def _check_kind(commit: Commit, names: Collection[str] | None) -> None:
    if names and not any(commit.has(name) for name in names):
        raise ArtefactError(
            f"checkpoint is {commit.path}, but it is of another kind of training and has none of {', '.join(names)}. Name a checkpoint of "
            f"a transformer's run."
        )


def open_verified(folder: str, names: Collection[str] | None = None) -> Commit:
    """The commit of a checkpoint folder, once its files verify, or those of certain names.

    Raises:
        ArtefactError: there is none, or its files do not verify.
    """
    commit = open_commit(folder.rstrip("/"))
    _check_kind(commit, names)
    problems = commit_problems(commit, names)
    if problems:
        raise ArtefactError(f"checkpoint is {folder}, but it is damaged: {'; '.join(problems)}. Use another checkpoint.")
    return commit


@contextmanager
def local_folder(commit: Commit, names: Iterable[str] | None = None) -> Iterator[str]:
    """A local folder with the checkpoint's files: its own, or a download that is removed afterwards.

    Args:
        commit: the checkpoint.
        names: the files needed, as the commit lists them; all if not given.
    """
    if storage.is_local(commit.path):
        yield commit.path
        return
    with tempfile.TemporaryDirectory(prefix="tessera-checkpoint-") as folder:
        download(commit, folder, names)
        yield folder


def download(commit: Commit, folder: str, names: Iterable[str] | None = None) -> None:
    """Fetches the checkpoint's files, or those of certain names, into a local folder."""
    for name in [entry["path"] for entry in commit.content["files"]] if names is None else names:
        target = os.path.join(folder, name)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        storage.download(storage.join(commit.path, name), target)


@dataclass(frozen=True, kw_only=True)
class Retention:
    """Which commits are kept: the newest, those at multiples of so many steps, and the best by validation NLL."""

    newest: int
    every_steps: int | None = None
    best: int = 0

    def kept(self, commits: list[Commit]) -> list[Commit]:
        """Those of these commits, given in order of step, that are kept."""
        measured = [commit for commit in commits if commit.validation_nll is not None]
        best = sorted(measured, key=lambda commit: (commit.validation_nll, commit.step))[: self.best]
        paths = {commit.path for commit in [*commits[-self.newest :], *best]}
        every = self.every_steps
        return [commit for commit in commits if commit.path in paths or (every and commit.step % every == 0)]


def prune(run_path: str, retention: Retention) -> None:
    """Removes commits that are not kept, and folders older than the newest commit without one: attempts that never committed, and what was
    set aside."""
    commits = list_commits(run_path)
    kept = {commit.path for commit in retention.kept(commits)}
    for commit in commits:
        if commit.path not in kept:
            _remove(commit)
    if not commits:
        return
    root = storage.join(run_path, "checkpoints")
    paths = storage.list_files(root)
    folders = {storage.join(root, path[len(root) + 1 :].split("/")[0]) for path in paths}
    committed = {path[: -len(COMMIT) - 1] for path in paths if path.endswith(f"/{COMMIT}")}
    newest = os.path.basename(commits[-1].path)[: len("step-000000000")]
    for folder in folders - committed:
        if os.path.basename(folder)[: len(newest)] < newest:
            storage.delete_tree(folder)


def retire_after(run_path: str, step: int) -> None:
    """Removes the commits of later steps, which a run has undone."""
    for commit in list_commits(run_path):
        if commit.step > step:
            _remove(commit)


def set_aside_damaged(run_path: str, latest: Commit) -> None:
    """Makes the damaged commits that are newer than the one a run goes on from exist no more, or they would count as how far it is. Their
    files stay, with COMMIT.json as DAMAGED.json, until `prune` finds a commit of a later step. What another process committed meanwhile
    verifies and is left alone."""
    for commit in list_commits(run_path):
        if _age(commit) > _age(latest) and commit_problems(commit) and is_there(commit):
            storage.replace(storage.join(commit.path, DAMAGED), storage.read_bytes(storage.join(commit.path, COMMIT)))
            storage.delete(storage.join(commit.path, COMMIT))
            logger.warning("Checkpoint %s is set aside: its %s is %s", commit.path, COMMIT, DAMAGED)


def was_set_aside(commit: Commit) -> bool:
    """Whether a run found the checkpoint damaged and went on from an earlier one."""
    return not is_there(commit) and storage.exists(storage.join(commit.path, DAMAGED))


def _age(commit: Commit) -> tuple[int, float]:
    return commit.step, commit.content["created_at"]


def _remove(commit: Commit) -> None:
    """COMMIT.json first: without it the rest is not a checkpoint."""
    storage.delete(storage.join(commit.path, COMMIT))
    storage.delete_tree(commit.path)
