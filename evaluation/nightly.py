"""The nightly job: evaluates what is new, once each, says what got worse, and renders the page.

It may run twice at once, be killed and be run again: a record is named by what decides its numbers, and the first one of a name
stays. Claims keep two nightlies from doing the same work; alerts that went out leave a file, so that each goes out once.
"""

import dataclasses
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from evaluation.alerts import Alerts
from evaluation.budget import Budget, BudgetSpent
from evaluation.candidates import Candidate, find_candidates
from evaluation.claims import Claim, take_claim
from evaluation.compare import group_series, regressions_of, to_judge
from evaluation.evaluate import EvaluateOptions, evaluate, prepare
from evaluation.history import write_report
from evaluation.hooks import check_hooks
from evaluation.records import Record, find_record, list_records, record_id, run_of
from pipeline import storage
from stages.errors import TesseraError
from stages.options import NightlyOptions

logger = logging.getLogger(__name__)

PAGE = "report.html"
REGRESSED = 3


@dataclass
class Night:
    """What became of every checkpoint, by path: its new record, or the one that was there, or left for another night; and what failed,
    by run or file."""

    evaluated: dict[str, str] = field(default_factory=dict)
    present: dict[str, str] = field(default_factory=dict)
    claimed_elsewhere: list[str] = field(default_factory=list)
    out_of_time: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


def nightly(options: EvaluateOptions, settings: NightlyOptions) -> dict[str, Any]:
    """Evaluates what is new and writes `report.html` into the evaluation folder. Ray must be connected.

    Whatever cannot be evaluated or read does not keep the rest from it.

    Returns:
        What became of every checkpoint, `regressions` that somebody was not told of yet, `page`, and `exit_code`: 0; 1 if
        something failed; 3 if something regressed.

    Raises:
        ConfigError: a webhook that cannot be one.
        ArtefactError: no run with a committed checkpoint.
        StorageError: a store that cannot be used.
    """
    check_hooks(settings)
    night, claims = Night(), _Claims(options.evaluation.path, settings.claim_seconds)
    budget = Budget(options.evaluation.path, options.evaluation.num_samples, settings.time_budget_seconds)
    with claims:
        for candidate in budget.order(find_candidates(options, settings.runs, settings.best)):
            with _noting_failure(night, candidate.name):
                _visit(candidate, night, claims, budget)
        records = list_records(options.evaluation.path, night.failed)
        page = storage.join(options.evaluation.path, PAGE)
        with _noting_failure(night, "page"):
            _render(options, settings, page)
        alerts = Alerts(options.evaluation.path, settings, claims.take)
        visited = {*night.evaluated.values(), *night.present.values()}
        pending = _judge(alerts, visited, records, settings.regression_threshold)
        if pending:
            with _noting_failure(night, "alert"):
                alerts.tell(pending, page)
    regressions = [regression for found in pending.values() for regression in found]
    return {
        **dataclasses.asdict(night),
        "regressions": regressions,
        "page": page,
        "exit_code": REGRESSED if regressions else int(bool(night.failed)),
    }


@contextmanager
def _noting_failure(night: Night, name: str) -> Iterator[None]:
    try:
        yield
    except TesseraError as error:
        logger.error("%s: %s", name, error)
        night.failed[name] = str(error)
    except Exception as error:  # a lost node, a full disk, a bug: none of them shall end the night
        logger.exception("%s", name)
        night.failed[name] = f"{type(error).__name__}: {error}"


class _Claims:
    """The claims of one night, given back at its end."""

    def __init__(self, evaluation_path: str, claim_seconds: float):
        self._folder = storage.join(evaluation_path, "claims")
        self._claim_seconds = claim_seconds
        self._held: dict[str, Claim] = {}

    def __enter__(self) -> "_Claims":
        return self

    def __exit__(self, *raised: object) -> None:
        for identifier, claim in self._held.items():
            try:
                claim.release()
            except OSError as error:  # a full disk, a store that fails: the claim runs out by itself
                logger.warning("The claim on %s could not be given back: %s", identifier, error)

    def take(self, identifier: str) -> bool:
        """Whether the work is ours."""
        if identifier not in self._held:
            claim = take_claim(self._folder, identifier, self._claim_seconds)
            if claim is None:
                return False
            self._held[identifier] = claim
        return True


def _visit(candidate: Candidate, night: Night, claims: _Claims, budget: Budget) -> None:
    options = candidate.choose()
    if options is None:
        return
    evaluation_path = options.evaluation.path
    preparation = prepare(options)
    identifier, path = record_id(preparation.identity), preparation.description["checkpoint"]
    if (record := find_record(evaluation_path, identifier)) is not None:
        night.present[path] = record.path
        return
    if not budget.holds(run_of(path)):
        logger.warning("%s is left for another night: nightly.time_budget_seconds does not suffice", path)
        night.out_of_time.append(path)
    elif not claims.take(identifier):
        logger.info("%s is being evaluated by another nightly", path)
        night.claimed_elsewhere.append(path)
    elif (record := find_record(evaluation_path, identifier)) is not None:  # between the look and the claim
        night.present[path] = record.path
    else:
        has_whole_night = budget.begin(run_of(path))
        try:
            record = evaluate(options, budget.progress(), preparation)
        except BudgetSpent as error:
            if has_whole_night:  # no night would be long enough
                raise
            logger.warning("%s is left for another night: %s", path, error)
            night.out_of_time.append(path)
        else:
            night.evaluated[path] = record.path
            budget.add(record)


def _render(options: EvaluateOptions, settings: NightlyOptions, page: str) -> None:
    """Writes the page, again if records came in the meantime: a page of two nightlies at once has those of both."""
    title = f"Evaluation of {', '.join(settings.runs) or options.run.path}"
    shown: list[str] | None = None
    while shown != (present := _record_paths(options.evaluation.path)):
        write_report(options, page, title, threshold=settings.regression_threshold)
        shown = present


def _record_paths(evaluation_path: str) -> list[str]:
    return storage.list_files(storage.join(evaluation_path, "records"), suffix=".json")


def _judge(alerts: Alerts, visited: set[str], records: list[Record], threshold: float) -> dict[str, list[dict[str, Any]]]:
    """What got worse, by record, and is to be told: in the series of the records that this night is about, by path, not in those of
    searches and other runs. Records of a night that was killed are judged too, and what no hook would take is told again."""
    series = [group for group in group_series(records) if visited & {record.path for record in group}]
    judged = alerts.judged()
    for group in series:
        for record in to_judge(group, judged):
            alerts.note(record.id, [regression.to_dict() for regression in regressions_of(record, group, threshold)])
    return alerts.pending({record.id for group in series for record in group})
