"""What goes wrong inside a training loop and is undone or ends it clearly: NaN, spikes, full disks, requests to leave, hangs."""

import itertools
import os
import resource

import pytest
import torch
from train_support import RECIPE, log_of, losses, options_for, start, train

from cluster import checkpoints, train_loop, train_metrics
from cluster import train_step as train_step_module
from cluster import training_run
from cluster.checkpoints import WEIGHTS
from cluster.verify_run import verify_run
from pipeline.order import batch_index
from stages.second_stage.transformer import nll


@pytest.fixture(scope="module")
def codes(tmp_path_factory):
    return RECIPE.write(tmp_path_factory.mktemp("codes"))


def poison(batches, factor):
    """Multiplies the loss of these global batches in this process, which poisons the weights too."""
    step = train_loop.train_step

    def poisoned_step(engine, loaded, *args, **kwargs):
        is_bad = loaded.batch in batches
        train_step_module.nll = (lambda *inputs: nll(*inputs) * factor) if is_bad else nll
        return step(engine, loaded, *args, **kwargs)

    train_loop.train_step = poisoned_step


def poison_batch_7():
    poison({7}, float("nan"))


def poison_every_batch_from_7():
    poison(range(7, 1000), float("nan"))


def poison_batches_8_and_9():
    poison({8, 9}, float("nan"))


def fail_at_step_10():
    step, calls = train_loop.train_step, itertools.count()

    def failing_step(engine, loaded, *args, **kwargs):
        assert next(calls) < 100, "the run never gives up"
        loss, norm = step(engine, loaded, *args, **kwargs)
        return (float("nan") if loaded.step == 10 else loss), norm

    train_loop.train_step = failing_step


def spike_at_batch_20():
    poison({20}, 3.0)


FOUR_EACH = {"num_steps": 12, "checkpoint_every_steps": 4, "skip_batches": 2, "keep_checkpoints": 9}


@pytest.mark.parametrize(
    "zero_stage, world_size",
    [(1, 1), (3, 2), pytest.param(0, 2, marks=pytest.mark.slow), pytest.param(2, 2, marks=pytest.mark.slow)],
)
def test_nan_is_undone_and_its_batches_are_left_out(tmp_path, codes, zero_stage, world_size):
    options = options_for(tmp_path, codes, deepspeed={"zero_stage": zero_stage}, train=FOUR_EACH)
    commit = train(options, world_size, poison_batch_7)
    assert commit.step == 12
    assert commit.content["sampler"]["skipped"] == [[6, 8]]
    (event,) = commit.content["events"]
    assert (event["step"], event["batch"], event["back_to"]) == (7, 7, 4) and "nan" in event["fault"]
    assert [record["batch"] for record in log_of(commit)] == [*range(6), *range(8, 14)]
    assert all(torch.isfinite(torch.tensor(losses(commit))))
    assert verify_run(options.run.path) == []
    shown = train_metrics.read_metrics(options.run.path)
    assert [line["step"] for line in shown] == list(range(12))


def test_a_fault_that_comes_again_undoes_a_commit(tmp_path, codes):
    options = options_for(tmp_path, codes, train={**FOUR_EACH, "skip_batches": 8})
    commit = train(options, 1, poison_batches_8_and_9)
    assert [event["back_to"] for event in commit.content["events"]] == [8, 4]
    assert [record["batch"] for record in log_of(commit)] == [*range(4), *range(10, 18)]
    assert verify_run(options.run.path) == []


def test_what_was_undone_is_the_same_after_a_resume(tmp_path, codes):
    whole = train(options_for(tmp_path / "whole", codes, train=FOUR_EACH), 1, poison_batch_7)
    options = options_for(tmp_path / "cut", codes, train=FOUR_EACH)
    train(options, 1, poison_batch_7)
    checkpoints.retire_after(options.run.path, 8)
    resumed = train(options, 1, poison_batch_7)
    assert losses(resumed) == losses(whole)
    assert resumed.content["events"] == whole.content["events"]


def test_a_spike_is_undone(tmp_path, codes):
    sections = {"num_steps": 24, "checkpoint_every_steps": 4, "skip_batches": 1, "spike_threshold": 20.0}
    options = options_for(tmp_path, codes, train=sections)
    commit = train(options, 1, spike_at_batch_20)
    assert commit.content["sampler"]["skipped"] == [[20, 21]]
    assert "above" in commit.content["events"][0]["fault"]
    assert verify_run(options.run.path) == []


def test_a_run_that_stays_ill_stops_with_its_commits(tmp_path, codes):
    options = options_for(tmp_path, codes, train={**FOUR_EACH, "max_rollbacks": 2})
    with pytest.raises(Exception, match="train.max_rollbacks is 2.*learning rate"):
        train(options, 1, poison_every_batch_from_7)
    assert checkpoints.latest_commit(options.run.path) is not None
    assert verify_run(options.run.path) == []


def test_a_run_that_is_ill_at_a_step_whatever_its_rows_stops(tmp_path, codes):
    options = options_for(tmp_path, codes, train={**FOUR_EACH, "skip_batches": 1, "max_rollbacks": 3})
    with pytest.raises(Exception, match="Step 10 has loss nan.*went back 3 times.*train.max_rollbacks is 3"):
        train(options, 1, fail_at_step_10)
    assert checkpoints.latest_commit(options.run.path).step == 8
    assert verify_run(options.run.path) == []


def test_skipped_batches_are_passed_over():
    skipped = [(2, 4), (5, 6)]
    assert [batch_index(step, skipped) for step in range(5)] == [0, 1, 4, 6, 7]


def leave_at_once():
    training_run.LOOK_AROUND_SECONDS = 0.0


def always():
    return True


def test_a_request_to_leave_commits_first(tmp_path, codes):
    options = options_for(tmp_path, codes, train={"num_steps": 1000, "checkpoint_every_steps": 1000})
    commit = train(options, 2, leave_at_once, always)
    assert 0 < commit.step < 1000
    assert verify_run(options.run.path) == []


def test_a_damaged_commit_is_no_progress_of_a_run_that_goes_on_before_it(tmp_path, codes):
    sections = {"num_steps": 6, "checkpoint_every_steps": 3}
    options = options_for(tmp_path, codes, train=sections)
    damaged = train(options, 1)
    os.remove(os.path.join(damaged.path, WEIGHTS))
    stopped = train(options, 1, leave_at_once, always)
    assert stopped.step == 4 and checkpoints.newest_commit(options.run.path) == stopped
    assert os.path.exists(os.path.join(damaged.path, checkpoints.DAMAGED))
    assert verify_run(options.run.path) == []
    assert train(options, 1).step == 6


def small_files_only():
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))


def test_a_full_disk_stops_clearly_and_loses_no_commit(tmp_path, codes):
    options = options_for(tmp_path, codes, train={"num_steps": 3})
    train(options, 2)
    more = options_for(tmp_path, codes, train={"num_steps": 6})
    with pytest.raises(Exception, match="run.path is .* cannot be written"):
        train(more, 2, small_files_only)
    assert checkpoints.latest_commit(options.run.path).step == 3
    assert train(more, 2).step == 6


def hang_at_step_2():
    step = train_loop.train_step

    def hanging_step(engine, loaded, *args, **kwargs):
        if loaded.step == 2 and os.environ["RANK"] == "1":
            import time

            time.sleep(1000)
        return step(engine, loaded, *args, **kwargs)

    train_loop.train_step = hanging_step


def test_ranks_end_when_one_hangs(tmp_path, codes):
    options = options_for(tmp_path, codes, scaling={"hang_timeout_seconds": 20.0})
    processes = start(options, 2, hang_at_step_2)
    with pytest.raises(Exception, match="70"):
        while not processes.join():
            pass
    assert train(options, 2).step == 6


def test_commits_follow_the_clock(tmp_path, codes):
    sections = {
        "num_steps": 5,
        "checkpoint_every_steps": 1000,
        "checkpoint_every_seconds": 1e-6,
        "keep_checkpoints": 99,
    }
    options = options_for(tmp_path, codes, train=sections)
    train(options, 2)
    assert [commit.step for commit in checkpoints.list_commits(options.run.path)] == [1, 2, 3, 4, 5]


def test_the_best_and_every_so_many_steps_are_kept(tmp_path, codes):
    sections = {
        "num_steps": 8,
        "checkpoint_every_steps": 1,
        "keep_checkpoints": 1,
        "keep_every_steps": 4,
        "keep_best": 1,
        "validation_path": codes,
        "validation_rows": 7,
    }
    options = options_for(tmp_path, codes, optim={"learning_rate": 0.1}, train=sections)
    last = train(options, 2)
    kept = checkpoints.list_commits(options.run.path)
    lines = train_metrics.read_metrics(options.run.path)
    assert lines
    best = min(kept, key=lambda commit: commit.validation_nll)
    assert {commit.step for commit in kept} == {4, 8, best.step}
    assert last.validation_nll > 0
