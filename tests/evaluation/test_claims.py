"""Claims: one owner at a time, given back or run out, also under a race of processes."""

import json
import multiprocessing
import os
import time

import pytest

from evaluation.claims import take_claim

LONG = 600.0


@pytest.fixture(params=["local", "s3"])
def folder(request, tmp_path):
    return str(tmp_path) if request.param == "local" else request.getfixturevalue("s3")


def test_a_claim_has_one_owner_until_it_is_given_back(folder):
    claim = take_claim(folder, "a", LONG)
    assert claim is not None
    assert take_claim(folder, "a", LONG) is None
    other = take_claim(folder, "b", LONG)
    assert other is not None
    claim.release()
    other.release()
    again = take_claim(folder, "a", LONG)
    assert again is not None
    again.release()


def test_a_claim_is_renewed_while_it_is_held(tmp_path):
    claim = take_claim(str(tmp_path), "a", 0.5)
    (file,) = (tmp_path / "a").iterdir()
    before = file.read_bytes()
    while file.read_bytes() == before:
        time.sleep(0.05)
    claim.release()
    assert json.loads(file.read_bytes())["is_released"]


def die_with_a_claim(folder):
    assert take_claim(folder, "a", LONG) is not None
    os._exit(0)


def test_the_claim_of_a_dead_process_runs_out(tmp_path):
    child = multiprocessing.get_context("spawn").Process(target=die_with_a_claim, args=(str(tmp_path),))
    child.start()
    child.join()
    assert take_claim(str(tmp_path), "a", LONG) is None
    time.sleep(0.3)
    claim = take_claim(str(tmp_path), "a", claim_seconds=0.2)
    assert claim is not None
    claim.release()


def race(folder, barrier, wins):
    barrier.wait()
    wins.put(take_claim(folder, "a", LONG) is not None)


def test_of_many_that_want_a_claim_at_once_one_gets_it(tmp_path):
    context = multiprocessing.get_context("fork")
    barrier, wins = context.Barrier(8), context.Queue()
    children = [context.Process(target=race, args=(str(tmp_path), barrier, wins)) for _ in range(8)]
    for child in children:
        child.start()
    results = [wins.get() for _ in children]
    for child in children:
        child.join()
    assert sum(results) == 1
