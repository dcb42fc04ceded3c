"""Actors of one kind, and work items over them that survive the death of an actor.

An item is a pure function of its bounds, so losing an actor costs its items only: they run again on another one.
Results come back in the order of the items, so whatever is summed from them has the same bits for any number of actors.
"""

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import ray
from ray.exceptions import NodeDiedError, ObjectLostError, RayActorError, WorkerCrashedError

from stages.errors import TesseraError

logger = logging.getLogger(__name__)

T = TypeVar("T")

# What the loss of a process or a machine looks like to the caller. An exception in the actor's code is RayTaskError,
# and no fault of these.
LOST = (RayActorError, ObjectLostError, WorkerCrashedError, NodeDiedError)
MAX_ATTEMPTS = 4
WAIT_NOTICE_SECONDS = 30.0


class ActorPool:
    """A fixed number of actors; one that dies is replaced, up to three times per place. Safe to use from several
    threads.

    Replacing instead of restarting in place means that no call waits on an actor which may not come back, and that a
    call which kills its actor cannot use up the restarts of the others.

    Args:
        name: what the actors do, for messages.
        create: starts one actor and returns its handle.
        size: number of actors.
    """

    def __init__(self, name: str, create: Callable[[], Any], size: int):
        self.name = name
        self.size = size
        self._create = create
        self._lock = threading.Lock()
        self._replacements_left = 3 * size
        self._starting: dict[Any, Any] = {}
        self._loads: dict[Any, int] = {}
        self._is_closed = False
        for _ in range(size):
            self._start()

    def acquire(self) -> Any:
        """The running actor with the fewest calls; waits until one runs. Give it back with `release`.

        Raises:
            RayActorError: the constructor of an actor failed.
            TesseraError: too many have died.
            RuntimeError: the pool was closed.
        """
        while True:
            with self._lock:
                if self._is_closed:
                    raise RuntimeError(f"the pool of {self.name} actors is closed")
                self._collect_started()
                if self._loads:
                    actor = min(self._loads, key=lambda candidate: self._loads[candidate])
                    self._loads[actor] += 1
                    return actor
                starting = list(self._starting)
            done, _ = ray.wait(starting, timeout=WAIT_NOTICE_SECONDS)
            if not done:
                logger.warning("Waiting for a %s actor to start", self.name)

    def release(self, actor: Any) -> None:
        """Ends one call of `acquire`."""
        with self._lock:
            if actor in self._loads:
                self._loads[actor] -= 1

    def replace_lost(self, error: BaseException) -> None:
        """Replaces the actor that the error names, if it is one of these and still counted as running.

        Raises:
            TesseraError: too many have died.
        """
        if not isinstance(error, RayActorError) or error.actor_id is None:
            return
        with self._lock:
            if self._is_closed:
                raise error
            for actor in [actor for actor in self._loads if actor._actor_id.hex() == error.actor_id]:
                del self._loads[actor]
                self._replace(actor, error)

    def close(self) -> None:
        """Ends all actors; whoever still waits for one gets its error."""
        with self._lock:
            self._is_closed = True
            for actor in [*self._loads, *self._starting.values()]:
                ray.kill(actor)
            self._loads.clear()
            self._starting.clear()

    def _start(self) -> None:
        actor = self._create()
        self._starting[actor.__ray_ready__.remote()] = actor

    def _collect_started(self) -> None:
        waiting = list(self._starting)
        done = ray.wait(waiting, num_returns=len(waiting), timeout=0)[0] if waiting else []
        for reference in done:
            actor = self._starting.pop(reference)
            try:
                ray.get(reference)
            except RayActorError as error:
                if error.actor_init_failed:
                    raise
                self._replace(actor, error)
            else:
                self._loads[actor] = 0

    def _replace(self, actor: Any, error: RayActorError) -> None:
        ray.kill(actor)
        if self._replacements_left == 0:
            raise TesseraError(
                f"evaluation's {self.name} actors died {3 * self.size + 1} times, but a sound one does not. "
                "See the Ray logs for the reason; most often memory ran out."
            ) from error
        self._replacements_left -= 1
        logger.warning("A %s actor died and is replaced: %s", self.name, str(error).splitlines()[0])
        self._start()


def run_items(
    items: Sequence[T], submit: Callable[[T, list[Any]], Any], pools: Sequence[ActorPool], window: int
) -> Iterator[tuple[T, Any]]:
    """Runs items over pools of actors and yields (item, result) in the order of the items.

    Args:
        items: work items, pure functions of their value.
        submit: starts one item on the acquired actors (one of each pool, in the order of `pools`) and returns the
            reference, or tuple of references, of its result. Called again, on other actors, when a process or machine
            is lost.
        pools: the pools an item needs.
        window: most items in flight or waiting for their turn, which bounds the memory.

    Raises:
        TesseraError: an item was lost MAX_ATTEMPTS times.
        RayTaskError: an item raised; it is not tried again.
    """
    running: dict[int, _Running] = {}
    started = 0
    for turn, item in enumerate(items):
        while started < min(turn + window, len(items)):
            running[started] = _Running(items[started], submit, pools)
            started += 1
        yield item, running.pop(turn).result()


class _Running:
    """One item in flight, with its attempts."""

    def __init__(self, item: Any, submit: Callable, pools: Sequence[ActorPool]):
        self._item = item
        self._submit = submit
        self._pools = pools
        self._attempts = 0
        self._begin()

    def result(self) -> Any:
        while True:
            try:
                return self._finish()
            except LOST as error:
                if isinstance(error, RayActorError) and error.actor_init_failed:
                    raise
                for pool in self._pools:
                    pool.replace_lost(error)
                if self._attempts == MAX_ATTEMPTS:
                    raise TesseraError(
                        f"item {self._item} was lost {MAX_ATTEMPTS} times, but a sound cluster loses it once. "
                        "See the Ray logs for the reason; most often memory ran out."
                    ) from error
                self._begin()

    def _begin(self) -> None:
        self._attempts += 1
        self._actors = [(pool, pool.acquire()) for pool in self._pools]
        self._references = self._submit(self._item, [actor for _, actor in self._actors])

    def _finish(self) -> Any:
        try:
            if isinstance(self._references, tuple):
                return tuple(ray.get(list(self._references)))
            return ray.get(self._references)
        finally:
            for pool, actor in self._actors:
                pool.release(actor)
