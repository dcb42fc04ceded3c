"""Nights over real runs: what is new is evaluated once, what got worse is told once, what cannot be done does no harm."""

import dataclasses
import datetime
import errno
import functools
import json
import os
import shutil
import threading
import time

import pytest
from evaluation_support import make_checkpoint, write_job
from report_support import content

from cluster import checkpoints
from evaluation import budget as budget_module
from evaluation import nightly as nightly_module
from evaluation.candidates import find_candidates, find_runs
from evaluation.claims import take_claim
from evaluation.evaluate import prepare
from evaluation.nightly import nightly
from evaluation.records import Record, list_records, record_id, run_of, write_record
from pipeline import storage
from pipeline.code_dataset import CodeDataset
from stages.config import to_yaml
from stages.errors import ArtefactError
from stages.options import NightlyOptions, RunOptions, TokenizerOptions


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A tokenizer, its code dataset, and a run with one checkpoint; folders that tests copy."""
    options = write_job(tmp_path_factory.mktemp("nightly"))
    evaluation = dataclasses.replace(options.evaluation, num_samples=16, num_blocks=2, num_reference_images=20)
    return dataclasses.replace(options, evaluation=evaluation)


@pytest.fixture
def options(job, tmp_path):
    """The same with a run and an evaluation folder of its own."""
    shutil.copytree(job.run.path, tmp_path / "run")
    evaluation = dataclasses.replace(job.evaluation, path=str(tmp_path / "evaluation"))
    return dataclasses.replace(job, run=RunOptions(path=str(tmp_path / "run")), evaluation=evaluation)


def fabricate(options, progress=None, preparation=None, gfd=90.0, seconds=60.0):
    """Stores what `evaluate` would, without measuring anything."""
    preparation = preparation or prepare(options)
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="milliseconds")
    body = {**content(100, gfd), **preparation.description, "identity": preparation.identity, "created_at": now}
    body |= {"wall_seconds": {"total": seconds}}
    return write_record(options.evaluation.path, record_id(preparation.identity), body, {})


@pytest.fixture
def unmeasured(monkeypatch):
    """Evaluations that cost nothing; everything around them is real."""
    monkeypatch.setattr(nightly_module, "evaluate", fabricate)


def add_checkpoint(options, step, run=None, **more):
    dataset = CodeDataset.open(options.codes.path, verify=False)
    return make_checkpoint(run or options.run.path, dataset, step=step, **more)


def worse(record: Record, step: int, sampling: dict | None = None, value: float | None = None) -> Record:
    """Stores what a much better checkpoint of an earlier step would have left, or one of that value."""
    written = ("format", "format_version", "record_id", "grids", "sha256")
    body = json.loads(json.dumps({k: v for k, v in record.content.items() if k not in written}))
    body |= {"step": step, "created_at": "2026-01-01T00:00:00.000+00:00"}
    body["identity"]["checkpoint_hash"] = f"better {step}"
    body["sampling"] = sampling or body["sampling"]
    body["identity"]["sampling"] = body["sampling"]
    body["metrics"]["gfd"]["value"] = value or body["metrics"]["gfd"]["value"] / 100
    folder = record.path[: record.path.index("/records/")]
    return write_record(folder, record_id(body["identity"]), body, {})


@pytest.mark.ray
def test_a_night_evaluates_what_is_new_tells_what_got_worse_and_only_once(ray_cluster, options, tmp_path):
    first = nightly(options, NightlyOptions())
    assert (first["exit_code"], len(first["evaluated"]), first["present"]) == (0, 1, {})
    (record,) = list_records(options.evaluation.path)
    again = nightly(options, NightlyOptions())
    assert (again["exit_code"], again["evaluated"], again["present"]) == (0, {}, first["evaluated"])

    worse(record, step=3)
    settings = NightlyOptions(command=f"cat >> {tmp_path}/told", regression_threshold=0.01)
    found = nightly(options, settings)
    assert found["exit_code"] == 3
    (told,) = found["regressions"]
    assert (told["metric"], told["step"], told["best_step"], told["record"]) == ("gfd", 7, 3, record.path)
    message = json.loads((tmp_path / "told").read_text())
    assert message["regressions"] == json.loads(json.dumps(found["regressions"]))
    assert "Worse than before" in (tmp_path / "evaluation" / "report.html").read_text()

    quiet = nightly(options, settings)
    assert (quiet["exit_code"], quiet["regressions"]) == (0, [])
    assert json.loads((tmp_path / "told").read_text()) == message, "told once"


def test_a_hook_that_fails_is_an_error_and_is_tried_again(options, tmp_path, unmeasured):
    nightly(options, NightlyOptions())
    worse(list_records(options.evaluation.path)[0], step=3)
    failing = nightly(options, NightlyOptions(command="exit 9"))
    assert failing["exit_code"] == 3 and "nightly.command is exit 9, but it fails" in failing["failed"]["alert"]
    assert nightly(options, NightlyOptions(command=f"cat > {tmp_path}/told"))["regressions"]
    assert (tmp_path / "told").exists()


def test_two_nightlies_at_once_leave_one_record_and_do_the_work_once(options, monkeypatch):
    calls = []

    def slow(*args):
        calls.append(args)
        time.sleep(0.5)  # so that they meet
        return fabricate(*args)

    monkeypatch.setattr(nightly_module, "evaluate", slow)
    summaries: list[dict] = []
    threads = [
        threading.Thread(target=lambda: summaries.append(nightly(options, NightlyOptions()))) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1 and len(list_records(options.evaluation.path)) == 1
    assert [summary["exit_code"] for summary in summaries] == [0, 0]
    assert sorted(len(summary["evaluated"]) for summary in summaries) == [0, 1]


def test_the_claim_of_a_living_nightly_is_respected_and_that_of_a_dead_one_taken_over(options, unmeasured):
    commit = checkpoints.latest_commit(options.run.path)
    identifier = record_id(prepare(dataclasses.replace(options, checkpoint=commit.path)).identity)
    claim = take_claim(f"{options.evaluation.path}/claims", identifier, 600.0)
    waiting = nightly(options, NightlyOptions())
    assert (waiting["claimed_elsewhere"], waiting["exit_code"]) == ([commit.path], 0)
    assert list_records(options.evaluation.path) == []
    claim.release()
    with open(os.path.join(options.evaluation.path, "claims", identifier, "000001.json"), "w") as file:
        json.dump({"owner": "gone", "renewed_at": 0.0, "is_released": False}, file)
    assert list(nightly(options, NightlyOptions())["evaluated"]) == [commit.path]


@pytest.mark.ray
def test_an_evaluation_that_the_whole_night_cannot_hold_is_stopped_and_is_an_error(ray_cluster, options, monkeypatch):
    stopped = nightly(options, NightlyOptions(time_budget_seconds=2.0))
    (message,) = stopped["failed"].values()  # it had the whole night
    assert "time_budget_seconds is 2, but then an evaluation was still running" in message and stopped["exit_code"] == 1
    assert list_records(options.evaluation.path) == []
    monkeypatch.setattr(nightly_module, "evaluate", fabricate)
    assert nightly(options, NightlyOptions())["evaluated"], "the claim was given back"


def test_newest_and_best_of_every_run_are_found_with_their_own_inputs(options, tmp_path):
    roots = tmp_path / "runs"
    for name in ("a", "b"):
        run = str(roots / name)
        add_checkpoint(options, 5, run, measured={"validation_nll": 1.0})
        add_checkpoint(options, 6, run, measured={"validation_nll": 2.0})
        add_checkpoint(options, 8, run, measured={"validation_nll": 3.0})
        own = dataclasses.replace(options, tokenizer=TokenizerOptions(path=f"/tokenizers/{name}"))
        (roots / name / "config.yaml").write_text(to_yaml(own))
    (roots / "unrelated").mkdir()
    assert list(find_runs([str(roots)])) == [str(roots / "a"), str(roots / "b")]
    found = [candidate.choose() for candidate in find_candidates(options, [str(roots)], best=True)]

    def step(checkpoint: str) -> str:
        return checkpoint if checkpoint == "latest" else str(int(checkpoint.split("step-")[1][:9]))

    steps = [(each.run.path[-1], step(each.checkpoint), each.tokenizer.path) for each in found]
    assert steps[:2] == [("b", "latest", "/tokenizers/b"), ("a", "latest", "/tokenizers/a")]
    assert sorted(steps[2:]) == [("a", "5", "/tokenizers/a"), ("b", "5", "/tokenizers/b")]
    assert len(find_candidates(options, [str(roots)], best=False)) == 2
    newest, best = find_candidates(options, [], best=True)
    assert newest.choose() == dataclasses.replace(options, checkpoint="latest") and best.choose() is None


def test_a_run_that_cannot_be_evaluated_does_not_keep_the_others_from_it(options, tmp_path, unmeasured):
    good, bad = str(tmp_path / "runs" / "good"), str(tmp_path / "runs" / "bad")
    commits = [add_checkpoint(options, 5, run) for run in (good, bad)]
    os.truncate(os.path.join(commits[1].path, checkpoints.WEIGHTS), 100)
    found = nightly(options, NightlyOptions(runs=(str(tmp_path / "runs"),)))
    assert list(found["evaluated"]) == [commits[0].path] and found["exit_code"] == 1
    assert list(found["failed"]) == [bad] and "are all damaged" in found["failed"][bad]


@pytest.mark.parametrize("damage", ["commit", "config", "lost node", "record"])
def test_nothing_that_is_damaged_or_lost_ends_the_night(options, tmp_path, unmeasured, monkeypatch, damage):
    good, bad = str(tmp_path / "runs" / "good"), str(tmp_path / "runs" / "bad")
    commits = [add_checkpoint(options, 5, run) for run in (good, bad)]
    settings = NightlyOptions(runs=(str(tmp_path / "runs"),))
    failing = bad
    if damage == "commit":
        with open(os.path.join(commits[1].path, checkpoints.COMMIT), "w") as file:
            file.write("{")
    elif damage == "config":
        with open(os.path.join(bad, "config.yaml"), "w") as file:
            file.write("tokenizer: {path: [")
    elif damage == "lost node":

        def lost(options, progress=None, preparation=None):
            if options.run.path == bad:
                raise RuntimeError("CUDA out of memory")
            return fabricate(options, progress, preparation)

        monkeypatch.setattr(nightly_module, "evaluate", lost)
    else:
        nightly(options, settings)
        failing = fabricate(dataclasses.replace(options, checkpoint=commits[1].path)).path
        with open(failing, "a") as file:
            file.write("}")
        new = add_checkpoint(options, 6, good)
    found = nightly(options, settings)
    assert list(found["evaluated"]) == [commits[0].path if damage != "record" else new.path] and found["exit_code"] == 1
    assert failing in found["failed"] and os.path.exists(found["page"])


class Clock:
    """Evaluations that take, on a clock that else stands still, so many seconds by the name of the run."""

    def __init__(self, **seconds):
        self.seconds, self.now = seconds, 0.0

    def monotonic(self):
        return self.now

    def evaluate(self, options, progress, preparation):
        seconds = self.seconds[os.path.basename(options.run.path)]
        self.now += seconds
        progress({}, {})
        return fabricate(options, preparation=preparation, seconds=seconds)


@pytest.fixture
def night(options, tmp_path, monkeypatch):
    """A night of 100 seconds over the runs below `runs/`, in which a checkpoint was added to each; they take so many seconds."""
    steps = iter(range(11, 99))

    def run_night(**seconds):
        clock, step = Clock(**seconds), next(steps)
        for name in seconds:
            add_checkpoint(options, step, str(tmp_path / "runs" / name), seed=step)
        monkeypatch.setattr(budget_module, "time", clock)
        monkeypatch.setattr(nightly_module, "evaluate", clock.evaluate)
        found = nightly(options, NightlyOptions(runs=(str(tmp_path / "runs"),), best=False, time_budget_seconds=100.0))
        names = {name: [run_of(path).rpartition("/")[2] for path in found[name]] for name in ("evaluated", "out_of_time", "failed")}
        return found | names

    return run_night


def test_no_evaluation_starts_that_would_end_after_the_night_and_what_waited_comes_first(night):
    found = [night(a=70.0, b=70.0) for _ in range(3)]
    assert [each["evaluated"] for each in found] == [["b"], ["a"], ["b"]]
    assert [each["out_of_time"] for each in found] == [["a"], ["b"], ["a"]]


def test_a_slow_evaluation_bars_no_later_one_and_runs_with_one_get_the_start_of_a_night_in_turn(night, options, tmp_path):
    for name in "ab":
        run = RunOptions(path=str(tmp_path / "runs" / name))
        add_checkpoint(options, 9, run.path)
        fabricate(dataclasses.replace(options, run=run, checkpoint="latest"), seconds=500.0)
    found = [night(a=20.0, b=20.0) for _ in range(2)]
    assert [each["evaluated"] for each in found] == [["a"], ["b", "a"]]
    assert [each["out_of_time"] for each in found] == [["b"], []], "not at the start, b needs more than is left, as far as one knows"


def test_a_run_that_fits_into_no_night_leaves_every_second_one_to_the_others(night):
    found = [night(a=150.0, b=20.0) for _ in range(4)]
    assert [each["evaluated"] for each in found] == [["b"], [], ["b"], []]
    assert [each["failed"] for each in found] == [[], ["a"], [], ["a"]]
    assert [each["exit_code"] for each in found] == [0, 1, 0, 1]


def test_an_evaluation_that_began_late_is_left_for_another_night(night):
    assert night(a=150.0, b=20.0)["out_of_time"] == ["a"]


def test_the_history_is_read_for_the_budget_once_and_only_if_there_is_one(options, night, unmeasured, monkeypatch):
    reads = []
    monkeypatch.setattr(budget_module, "list_records", lambda path: reads.append(path) or list_records(path))
    nightly(options, NightlyOptions())
    assert reads == []
    night(a=1.0, b=1.0, c=1.0)
    assert reads == [options.evaluation.path]


def test_a_claim_that_cannot_be_given_back_does_not_end_the_night(options, unmeasured, monkeypatch):
    replace = storage.replace

    def replace_unless_full(path, data):
        if "/claims/" in path:
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(path, data)

    monkeypatch.setattr(storage, "replace", replace_unless_full)
    found = nightly(options, NightlyOptions())
    assert (len(found["evaluated"]), found["exit_code"]) == (1, 0)


def test_what_no_hook_would_take_is_told_when_the_training_has_gone_on(options, tmp_path, unmeasured, monkeypatch):
    nightly(options, NightlyOptions())
    record = list_records(options.evaluation.path)[0]
    worse(record, step=3)
    assert nightly(options, NightlyOptions(command="exit 9"))["exit_code"] == 3
    add_checkpoint(options, step=9, seed=1)
    monkeypatch.setattr(nightly_module, "evaluate", functools.partial(fabricate, gfd=0.5))
    told = nightly(options, NightlyOptions(command=f"cat > {tmp_path}/told"))
    assert [found["step"] for found in told["regressions"]] == [7] and told["exit_code"] == 3
    assert json.loads((tmp_path / "told").read_text())["regressions"] == told["regressions"]
    assert nightly(options, NightlyOptions(command="cat"))["exit_code"] == 0
    late = NightlyOptions(command="cat", webhook="http://127.0.0.1:9/")
    assert nightly(options, late)["exit_code"] == 0, "a hook that is set later is told of later records only"


def test_a_record_of_a_night_that_was_killed_is_judged_by_the_next(options, tmp_path, unmeasured):
    nightly(options, NightlyOptions())
    worse(list_records(options.evaluation.path)[0], step=3, value=89.0)
    nightly(options, NightlyOptions())  # 90 against 89 is no regression
    add_checkpoint(options, step=9, seed=1)
    fabricate(dataclasses.replace(options, checkpoint="latest"), gfd=500.0)  # all that was left of a night
    add_checkpoint(options, step=11, seed=2)
    found = nightly(options, NightlyOptions())
    assert [regression["step"] for regression in found["regressions"]] == [9]


def test_each_hook_is_told_once(options, tmp_path, unmeasured):
    nightly(options, NightlyOptions())
    worse(list_records(options.evaluation.path)[0], step=3)
    command = f"cat >> {tmp_path}/told"
    both = NightlyOptions(command=command, webhook="http://127.0.0.1:9/")
    for _ in range(2):
        found = nightly(options, both)
        assert found["exit_code"] == 3 and "webhook" in found["failed"]["alert"] and "command" not in found["failed"]["alert"]
    told = json.loads((tmp_path / "told").read_text())
    assert told["regressions"] == json.loads(json.dumps(found["regressions"]))
    assert nightly(options, NightlyOptions(command=command))["exit_code"] == 0


def test_nightlies_with_other_hooks_keep_to_their_own(options, tmp_path, unmeasured):
    nightly(options, NightlyOptions())
    worse(list_records(options.evaluation.path)[0], step=3)
    assert nightly(options, NightlyOptions())["exit_code"] == 3, "by hand, without a hook"
    for name in ("first", "second"):
        settings = NightlyOptions(command=f"cat > {tmp_path}/{name}") if name == "first" else NightlyOptions(webhook="http://127.0.0.1:9/")
        assert nightly(options, settings)["exit_code"] == 3
    assert (tmp_path / "first").exists()


def test_two_nightlies_at_once_tell_once(options, tmp_path, unmeasured):
    nightly(options, NightlyOptions())
    worse(list_records(options.evaluation.path)[0], step=3)
    settings = NightlyOptions(command=f"sleep 0.5; cat >> {tmp_path}/told; echo >> {tmp_path}/told")
    summaries: list[dict] = []
    threads = [threading.Thread(target=lambda: summaries.append(nightly(options, settings))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(summary["exit_code"] for summary in summaries) == [0, 3]
    assert len((tmp_path / "told").read_text().splitlines()) == 1


def test_searches_and_other_runs_in_the_folder_raise_no_alarm(options, unmeasured):
    nightly(options, NightlyOptions())
    (record,) = list_records(options.evaluation.path)
    for step, value in ((3, 1.0), (5, 1000.0)):  # of a search: other sampling options
        trial = worse(record, step, sampling={**record.content["sampling"], "temperature": 0.5}, value=value)
    assert trial.step == 5 and nightly(options, NightlyOptions())["exit_code"] == 0


def test_without_a_run_the_folder_is_named(options, tmp_path):
    with pytest.raises(ArtefactError, match="nightly.runs has .*nowhere, but there is no run"):
        nightly(options, NightlyOptions(runs=(str(tmp_path / "nowhere"),)))
    empty = dataclasses.replace(options, run=RunOptions(path=str(tmp_path / "none")))
    with pytest.raises(ArtefactError, match="run.path is .*none, but it has no committed checkpoint"):
        nightly(empty, NightlyOptions())
