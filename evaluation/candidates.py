"""Which checkpoints a night is about: every run's newest commit, and its best one."""

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import yaml

from cluster import checkpoints
from evaluation.evaluate import EvaluateOptions
from pipeline import storage
from stages.config import build
from stages.errors import ArtefactError
from stages.options import ConditioningOptions

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Candidate:
    """One checkpoint to evaluate, and how."""

    commit: checkpoints.Commit
    options: EvaluateOptions


def find_runs(roots: Sequence[str]) -> list[str]:
    """Folders of runs with at least one commit, among these folders and below them, sorted.

    Raises:
        ArtefactError: below one of the folders there is none.
    """
    found = set()
    for root in roots:
        below = set(_runs_below(storage.absolute(root)))
        if not below:
            raise ArtefactError(
                f"nightly.runs has {root}, but there is no run with a committed checkpoint in it. "
                "Name a run's folder, or one with runs in it."
            )
        found |= below
    return sorted(found)


def _runs_below(root: str) -> Iterator[str]:
    runs = set()
    for path in storage.list_files(root, suffix=f"/{checkpoints.COMMIT}"):
        run, separator, rest = path.rpartition("/checkpoints/")
        if separator and rest.count("/") == 1:
            runs.add(run)
    for run in runs:
        # The training of a tokenizer has commits too, but no transformer in them.
        if any("transformer" in commit.content for commit in checkpoints.list_commits(run)[-1:]):
            yield run


def find_candidates(options: EvaluateOptions, roots: Sequence[str], best: bool) -> list[Candidate]:
    """The newest commit of every run, newest commit first, then the best ones that are not the newest.

    Args:
        options: how to evaluate. A run other than `run.path` keeps its own tokenizer and code dataset, from the
            config.yaml in its folder.
        roots: where to look; `run.path` if there are none.
        best: whether the commit of the lowest validation NLL counts too, where it was measured.

    Raises:
        ArtefactError: no run, or a run without a commit.
    """
    newest, others = [], []
    for run in find_runs(roots) if roots else [options.run.path]:
        commits = checkpoints.list_commits(run)
        if not commits:
            raise ArtefactError(f"run.path is {run}, but it has no committed checkpoint. Run train first.")
        chosen = _options_of(run, options)
        newest.append(Candidate(commits[-1], chosen))
        measured = [commit for commit in commits if commit.validation_nll is not None]
        lowest = min(measured, key=lambda commit: (commit.validation_nll, commit.step), default=commits[-1])
        if best and lowest.path != commits[-1].path:
            others.append(Candidate(lowest, chosen))
    newest.sort(key=lambda candidate: -candidate.commit.content["created_at"])
    return newest + others


def _options_of(run: str, options: EvaluateOptions) -> EvaluateOptions:
    """`options` for another run: tokenizer, code dataset and conditions are its own."""
    if run == options.run.path:
        return options
    path = storage.join(run, "config.yaml")
    try:
        config = yaml.safe_load(storage.read_bytes(path))
    except FileNotFoundError:
        logger.warning("%s is not there: tokenizer.path and codes.path are taken as given", path)
        return dataclasses.replace(options, run=dataclasses.replace(options.run, path=run))
    sections = {name: getattr(options, name) for name in ("run", "tokenizer", "codes")}
    paths = {name: config.get(name, {}).get("path", section.path) for name, section in sections.items()} | {"run": run}
    return dataclasses.replace(
        options,
        conditioning=build(ConditioningOptions, config.get("conditioning", {}), "conditioning."),
        **{name: dataclasses.replace(section, path=paths[name]) for name, section in sections.items()},
    )
