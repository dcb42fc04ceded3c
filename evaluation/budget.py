"""The time of a night: what still fits into it, and which run comes first when not everything does."""

import datetime
import json
import logging
import math
import time
from collections.abc import Sequence

from evaluation.candidates import Candidate
from evaluation.evaluate import Progress, log_progress
from evaluation.hashing import canonical_hash
from evaluation.records import Record, list_records
from pipeline import storage
from stages.errors import TesseraError

logger = logging.getLogger(__name__)

WHOLE_NIGHT = 0.9  # share of the budget


class BudgetSpent(TesseraError):
    """The time is over while an evaluation runs."""


class Budget:
    """The time of one night, from now on.

    A run whose evaluation may need a whole night can only begin one at the start of a night. So that all get that start in turn,
    `turns/` keeps when each had it last: what was begun then and did not end leaves no record.

    Args:
        evaluation_path: folder of the history, which is read once, and only if time is limited.
        num_samples: of the evaluations.
        seconds: how long the night is; None for no limit.
    """

    def __init__(self, evaluation_path: str, num_samples: int, seconds: float | None):
        self.seconds = math.inf if seconds is None else seconds
        self._deadline = time.monotonic() + self.seconds
        self._folder = storage.join(evaluation_path, "turns")
        self._num_samples = num_samples
        self._records: list[Record] = []
        for record in list_records(evaluation_path) if self._is_limited else ():
            self.add(record)
        self._has_begun = False

    def add(self, record: Record) -> None:
        """Learns from the newest record how long an evaluation takes, if it is one of as many samples."""
        if record.content["evaluation"]["num_samples"] == self._num_samples:
            self._records.append(record)

    def order(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """The newest checkpoints, then the best ones; of either, where time is limited, the runs first that waited longest."""
        last = self._last_turns() if self._is_limited else {}
        return sorted(candidates, key=lambda candidate: (candidate.is_best, last.get(candidate.run, "")))

    def holds(self, run: str) -> bool:
        """Whether to begin an evaluation of this run: the last one, or else that of another run, took no longer than what is left, or
        no other night would leave more. Nothing is known at first."""
        own = [record for record in self._records if record.run == run]
        alike = own or self._records
        expected = _seconds_again(alike[-1]) if alike else 0.0
        return expected <= self._left() or self._is_start()

    def begin(self, run: str) -> bool:
        """Notes that an evaluation of this run begins, and returns whether it has the whole night."""
        is_whole = self._is_whole()
        if self._is_limited and self._is_start():
            turn = {"run": run, "began_at": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="milliseconds")}
            storage.replace(storage.join(self._folder, f"{canonical_hash(run)[:32]}.json"), json.dumps(turn).encode())
        self._has_begun = True
        return is_whole

    def progress(self) -> Progress:
        """Logs how far an evaluation is. Raises BudgetSpent when the night is over."""
        report = log_progress()

        def progress(done: dict[str, int], totals: dict[str, int]) -> None:
            if self._left() < 0:
                raise BudgetSpent(
                    f"nightly.time_budget_seconds is {self.seconds:g}, but then an evaluation was still running. Raise it, or lower "
                    f"evaluation.num_samples."
                )
            report(done, totals)

        return progress

    @property
    def _is_limited(self) -> bool:
        return self.seconds < math.inf

    def _left(self) -> float:
        return self._deadline - time.monotonic()

    def _is_whole(self) -> bool:
        return self._left() > WHOLE_NIGHT * self.seconds

    def _is_start(self) -> bool:
        # Looking at many runs that have nothing new may take more than the rest of a night that counts as whole.
        return self._is_whole() or not self._has_begun

    def _last_turns(self) -> dict[str, str]:
        """By run: ISO time of its newest record, or of the last start of a night that it had, if that is later."""
        last = {record.run: record.created_at for record in self._records}
        for path in storage.list_files(self._folder, suffix=".json"):
            try:
                turn = json.loads(storage.read_bytes(path))
                last[turn["run"]] = max(turn["began_at"], last.get(turn["run"], ""))
            except (ValueError, TypeError, KeyError) as error:  # the next turn of that run writes it anew
                logger.warning("%s is damaged and is not counted: %s", path, error)
        return last


def _seconds_again(record: Record) -> float:
    """What an evaluation took but for its reference, which is kept. Sampling ran beside reference and held-out images."""
    seconds = record.content["wall_seconds"]
    if "reference" not in seconds:
        return seconds["total"]
    beside = max(seconds.get("sampling", 0.0), seconds["holdout"])
    return seconds["total"] - max(seconds["working"] - beside, 0.0)
