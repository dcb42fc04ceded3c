import os
import time

import pytest
import ray

from evaluation.pool import MAX_ATTEMPTS, ActorPool, run_items
from stages.errors import ArtefactError, TesseraError

pytestmark = pytest.mark.ray


class Worker:
    """Answers with its item; dies or raises where the item says so."""

    def __init__(self, folder: str, dies_at_first: bool = False):
        self.folder = folder
        if dies_at_first and self._count("start") == 0:
            os._exit(1)

    def square(self, item: int, deadly: tuple[int, ...] = (), times: int = 1) -> int:
        time.sleep(0.01 * (item % 3))
        if item in deadly and self._count(item) < times:
            os._exit(1)
        return item * item

    def add_one(self, value: int) -> int:
        return value + 1

    def refuse(self) -> None:
        raise ArtefactError("checkpoint is old, but it must be new. Train again.")

    def _count(self, item: int | str) -> int:
        """How often this item was begun before."""
        path = os.path.join(self.folder, str(item))
        with open(path, "a+") as file:
            count = file.tell()
            file.write("x")
        return count


def pool(folder, size: int, *args) -> ActorPool:
    remote = ray.remote(num_cpus=0.1, max_restarts=0, allow_out_of_order_execution=True)(Worker)
    return ActorPool("test", lambda: remote.remote(str(folder), *args), size)


@pytest.fixture
def closing():
    pools = []
    yield lambda *args: pools.append(pool(*args)) or pools[-1]
    for each in pools:
        each.close()


@pytest.mark.parametrize("size", [1, 3])
def test_results_come_in_order_whatever_the_number_of_actors(ray_cluster, tmp_path, closing, size):
    actors = closing(tmp_path, size)
    found = list(run_items(range(20), lambda item, a: a[0].square.remote(item), [actors], window=5))
    assert found == [(i, i * i) for i in range(20)]


def test_a_killed_actor_costs_its_items_only(ray_cluster, tmp_path, closing):
    first, second = closing(tmp_path, 2), closing(tmp_path, 1)

    def submit(item, actors):
        return actors[1].add_one.remote(actors[0].square.remote(item, deadly=(3, 8)))

    found = list(run_items(range(12), submit, [first, second], window=4))
    assert found == [(i, i * i + 1) for i in range(12)]
    assert os.path.getsize(tmp_path / "3") >= 2 and os.path.getsize(tmp_path / "8") >= 2


def test_an_actor_killed_while_it_starts_is_replaced(ray_cluster, tmp_path, closing):
    actors = closing(tmp_path, 1, True)
    assert list(run_items([5], lambda item, a: a[0].square.remote(item), [actors], window=1)) == [(5, 25)]


def test_a_closed_pool_lets_nobody_wait(ray_cluster, tmp_path, closing):
    actors = closing(tmp_path, 1)
    actors.close()
    with pytest.raises(RuntimeError, match="closed"):
        actors.acquire()


def test_an_item_that_always_kills_is_given_up_with_a_reason(ray_cluster, tmp_path, closing):
    actors = closing(tmp_path, 2)
    with pytest.raises(TesseraError, match=f"item 2 was lost {MAX_ATTEMPTS} times"):
        list(run_items(range(4), lambda i, a: a[0].square.remote(i, deadly=(2,), times=99), [actors], window=1))


def test_an_actor_that_keeps_dying_is_given_up_with_a_reason(ray_cluster, tmp_path, closing):
    actors = closing(tmp_path, 1)
    everyone = tuple(range(8))
    with pytest.raises(TesseraError, match="test actors died 4 times"):
        list(run_items(everyone, lambda i, a: a[0].square.remote(i, deadly=everyone, times=2), [actors], window=1))


def test_an_error_in_the_work_is_not_retried(ray_cluster, tmp_path, closing):
    actors = closing(tmp_path, 1)
    with pytest.raises(ArtefactError, match="Train again"):
        list(run_items([0], lambda item, a: a[0].refuse.remote(), [actors], window=1))


def test_no_more_items_are_in_flight_than_the_window(ray_cluster, tmp_path, closing):
    actors = closing(tmp_path, 1)
    begun = []
    results = run_items(range(10), lambda item, a: begun.append(item) or a[0].square.remote(item), [actors], window=3)
    for finished, _ in enumerate(results):
        assert len(begun) <= finished + 3
    assert begun == list(range(10))
