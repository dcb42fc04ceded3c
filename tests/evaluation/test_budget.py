"""What fits into a night, on a clock that tests set."""

from types import SimpleNamespace

import pytest
from report_support import content

from evaluation import budget as budget_module
from evaluation.budget import Budget
from evaluation.candidates import Candidate
from evaluation.records import record_id, write_record

RUN = "/runs/a"


@pytest.fixture
def clock(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(budget_module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def write(path, step, **changes):
    body = content(step, 90.0, **changes)
    return write_record(str(path), record_id(body["identity"]), body, {})


def longest_that_is_left(path, clock, run=RUN):
    """Seconds that must be left of a night of 1000 in which something has begun, for an evaluation to begin."""
    budget = Budget(str(path), 512, 1000.0)
    budget.begin("/runs/other")
    start = clock.now
    for left in range(890, -1, -10):
        clock.now = start + 1000.0 - left
        if not budget.holds(run):
            return left + 10
    return 0


def test_an_evaluation_needs_what_the_last_one_took_without_making_the_reference(tmp_path, clock):
    assert longest_that_is_left(tmp_path, clock) == 0, "nothing is known"
    write(tmp_path, 100, wall_seconds={"total": 300.0})
    assert longest_that_is_left(tmp_path, clock) == 300
    beside = {"start": 10.0, "sampling": 120.0, "holdout": 40.0, "distance": 50.0}
    write(tmp_path, 200, wall_seconds={**beside, "reference": 500.0, "working": 540.0, "total": 600.0})
    assert longest_that_is_left(tmp_path, clock) == 180
    write(tmp_path, 300, wall_seconds={**beside, "working": 120.0, "total": 180.0}, num_samples=64)
    write(tmp_path, 400, wall_seconds={"total": 450.0}, run="/runs/b")
    assert longest_that_is_left(tmp_path, clock) == 180, "others are of another run or another size"
    assert longest_that_is_left(tmp_path, clock, "/runs/new") == 450


def test_runs_that_waited_longest_come_first_and_the_best_checkpoints_last(tmp_path, clock):
    write(tmp_path, 200, run="/runs/a")
    write(tmp_path, 100, run="/runs/b")
    candidates = [Candidate(f"/runs/{name}", is_best, None) for is_best in (False, True) for name in "abcd"]

    def order():
        return [each.name for each in Budget(str(tmp_path), 512, 1000.0).order(candidates)]

    first = [f"/runs/{name}" for name in "cdba"]
    assert order() == [*first, *(f"{run} (best)" for run in first)]
    Budget(str(tmp_path), 512, 1000.0).begin("/runs/c")
    assert order()[:4] == [f"/runs/{name}" for name in "dbac"], "it had the start of a night, whatever became of it"
    (turn,) = (tmp_path / "turns").iterdir()
    turn.write_text("{")
    assert order()[:4] == first
    assert Budget(str(tmp_path), 512, None).order(candidates) == candidates
