"""Which checkpoints a night is about: every run's newest one, and its best."""

import dataclasses
import logging
from collections import defaultdict
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
    """The newest checkpoint of a run, or its best one, and how it is evaluated. Which one that is, is decided when its turn comes:
    a training that goes on publishes others meanwhile, and removes old ones."""

    run: str
    is_best: bool
    options: EvaluateOptions

    @property
    def name(self) -> str:
        return f"{self.run} (best)" if self.is_best else self.run

    def choose(self) -> EvaluateOptions | None:
        """How to evaluate the checkpoint it is now; None where the best one is the newest, or no validation was measured.

        A newest checkpoint that is damaged is passed over, as everywhere. Raises ArtefactError: all are.
        """
        options = _options_of(self.run, self.options)
        if not self.is_best:
            return dataclasses.replace(options, checkpoint="latest")
        commits = checkpoints.list_commits(self.run)
        measured = [commit for commit in commits if commit.validation_nll is not None]
        lowest = min(measured, key=lambda commit: (commit.validation_nll, commit.step), default=None)
        if lowest is None or lowest.path == commits[-1].path:
            return None
        return dataclasses.replace(options, checkpoint=lowest.path)


def find_runs(roots: Sequence[str]) -> dict[str, float]:
    """Folders of runs with at least one commit, among these folders and below them, with the time of their newest one.

    Raises:
        ArtefactError: below one of the folders there is none.
    """
    found: dict[str, float] = {}
    for root in roots:
        below = dict(_runs_below(storage.absolute(root)))
        if not below:
            raise ArtefactError(
                f"nightly.runs has {root}, but there is no run with a committed checkpoint in it. "
                "Name a run's folder, or one with runs in it."
            )
        found |= below
    return found


def _runs_below(root: str) -> Iterator[tuple[str, float]]:
    folders: defaultdict[str, list[str]] = defaultdict(list)
    for path in storage.list_files(root, suffix=f"/{checkpoints.COMMIT}"):
        run, separator, rest = path.rpartition("/checkpoints/")
        if separator and rest.count("/") == 1:
            folders[run].append(path.rpartition("/")[0])  # in order of name, which is that of the steps
    for run, found in folders.items():
        newest = _newest_readable(found)
        if newest is None:
            yield run, 0.0  # all are damaged: its evaluation fails by name
        elif "transformer" in newest.content:  # which the training of a tokenizer does not have
            yield run, newest.content["created_at"]


def _newest_readable(folders: Sequence[str]) -> checkpoints.Commit | None:
    for folder in reversed(folders):
        try:
            return checkpoints.open_commit(folder)
        except ArtefactError:
            pass  # who evaluates the run says so
    return None


def find_candidates(options: EvaluateOptions, roots: Sequence[str], best: bool) -> list[Candidate]:
    """The newest checkpoint of every run, the run with the newest one first, then the best ones.

    Args:
        options: how to evaluate. A run other than `run.path` keeps its own tokenizer and code dataset, from the
            config.yaml in its folder; that is read when its turn comes, too.
        roots: where to look; `run.path` if there are none.
        best: whether the checkpoint of the lowest validation NLL counts too, where it was measured.

    Raises:
        ArtefactError: no run.
    """
    runs = find_runs(roots) if roots else {options.run.path: 0.0}
    if not roots and not storage.list_files(storage.join(options.run.path, "checkpoints"), suffix=f"/{checkpoints.COMMIT}"):
        raise ArtefactError(f"run.path is {options.run.path}, but it has no committed checkpoint. Run train first.")
    ordered = sorted(runs, key=lambda run: -runs[run])
    kinds = (False, True) if best else (False,)
    return [Candidate(run, is_best, options) for is_best in kinds for run in ordered]


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
