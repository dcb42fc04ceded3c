"""kill -9 anywhere in the commit protocol: nothing lost, nothing repeated, old or new but never half.

A process without threads forks the writers and readers, which is cheap and safe; it runs apart from the test process,
which has threads of Ray and S3.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from kill_support import (
    MIN_KILLS,
    content,
    fork,
    half,
    in_child,
    kill,
    prepare,
    root_hash,
    sound,
    wait,
    write,
    write_and_die,
)

ROOT = Path(__file__).parents[3]
LOCAL_POINTS = ("fsync", "link", "unlink", "remove", "mkdir")
SPREAD = {"local": 11, "s3": 13}  # in `make test`, of so many deaths one
COORDINATORS = 3

pytestmark = pytest.mark.timeout(3600)
quick_and_slow = pytest.mark.parametrize("speed", ["quick", pytest.param("slow", marks=pytest.mark.slow)])
places = pytest.mark.parametrize("place", ["local", "s3"])


@quick_and_slow
@places
def test_a_writer_killed_at_any_point_is_resumed(place, speed, request):
    points = LOCAL_POINTS if place == "local" else ("request",)
    step = 1 if speed == "slow" else SPREAD[place]
    num_kills = run("points", place, request, points=points, step=step)
    assert num_kills >= MIN_KILLS[f"points-{place}"][speed == "slow"]


@quick_and_slow
@places
def test_coordinators_that_are_killed_while_they_race_write_one_dataset(place, speed, request):
    wanted = MIN_KILLS[f"coordinators-{place}"][speed == "slow"]
    assert run("coordinators", place, request, wanted=wanted) >= wanted


def test_the_suites_kill_often_enough():
    quick, slow = map(sum, zip(*MIN_KILLS.values()))
    assert quick >= 20 and quick + slow >= 500


def run(scenario, place, request, **options):
    """Runs a scenario of this file in a process of its own; the number of kills that were delivered."""
    base = request.getfixturevalue("s3") if place == "s3" else None
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    command = [sys.executable, __file__, scenario, json.dumps({"base": base, **options})]
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-5000:]
    return json.loads(process.stdout.splitlines()[-1])


def kill_at_points(base, undisturbed, points, step):
    """One writer for every `step`-th death that there is; each is killed, and another completes what it left."""
    deaths = []
    for point in points:
        num_calls = in_child(write_and_die, f"{base}/{point}", point)
        assert num_calls > 0, f"{point} is never called: the test no longer reaches the protocol"
        deaths += [(point, number) for number in range(2 * num_calls)]
    for point, number in deaths[step // 2 :: step]:
        root = f"{base}/{point}-{number}"
        assert wait(fork(write_and_die, root, point, number)), f"{point} {number} was not reached"
        check(root, undisturbed)
    return len(deaths[step // 2 :: step])


def kill_coordinators(base, undisturbed, wanted):
    """Races on one dataset after another, until so many coordinators were killed."""
    num_kills, num_races = 0, 0
    while num_kills < wanted:
        num_kills += race(f"{base}/{num_races}", undisturbed)
        num_races += 1
    return num_kills


def race(root, undisturbed):
    """Coordinators write one dataset; who is killed starts again, until one is through and the others die with it."""
    choice, num_kills = random.SystemRandom(), 0
    children = [fork(write, root) for _ in range(COORDINATORS)]
    while True:
        time.sleep(choice.random() * undisturbed["seconds"])
        victim = choice.randrange(COORDINATORS)
        if not kill(children[victim]):
            break
        num_kills += 1
        assert not in_child(half, root), f"a reader saw half of {root}"
        children[victim] = fork(write, root)
    del children[victim]
    num_kills += sum(kill(child) for child in children)
    check(root, undisturbed)
    return num_kills


def check(root, undisturbed):
    """A reader of what was left sees all or nothing, and one more writer makes it the undisturbed dataset."""
    assert not in_child(half, root), f"a reader saw half of {root}"
    assert not wait(fork(write, root))
    is_sound, files = in_child(lambda: [sound(root, undisturbed["root_hash"]), content(root)])
    assert is_sound, f"{root} is damaged"
    assert files == undisturbed["content"], f"{root} holds other files"


def write_undisturbed(root):
    """What every dataset must be in the end, and how long one writer takes."""
    assert not wait(fork(write, root))
    started = time.monotonic()
    assert not wait(fork(write, f"{root}-again"))
    return {
        "seconds": time.monotonic() - started,
        "root_hash": in_child(root_hash, root),
        "content": in_child(content, root),
    }


def main(scenario, options):
    prepare()
    # A sync costs nothing in memory; power cuts are not the subject.
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        base = options.pop("base") or folder
        run_scenario = {"points": kill_at_points, "coordinators": kill_coordinators}[scenario]
        print(run_scenario(base, write_undisturbed(f"{base}/undisturbed"), **options))


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
