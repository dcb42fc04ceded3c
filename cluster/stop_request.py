"""SIGTERM to a driver becomes a request that its workers see, so that they commit and leave."""

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
import ray.train
import ray.train.collective
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from stages.errors import TesseraError

logger = logging.getLogger(__name__)


@ray.remote(num_cpus=0)
class _Request:
    def __init__(self) -> None:
        self._is_made = False

    def make(self) -> None:
        self._is_made = True

    def is_made(self) -> bool:
        return self._is_made


class StopRequest:
    """A request that a driver makes and its workers see. It lives on the driver's node."""

    def __init__(self) -> None:
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self._actor: Any = _Request.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]
        self._signalled = threading.Event()

    @property
    def is_made(self) -> bool:
        """Whether this driver made it."""
        return self._signalled.is_set()

    @contextmanager
    def on_sigterm(self) -> Iterator[None]:
        """Within it, SIGTERM makes the request instead of ending the driver. Only the main thread can have it so.

        A second SIGTERM has its usual effect, for there may be no worker that could leave.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        # A handler runs wherever the main thread is, also inside Ray; what asks Ray runs on a thread of its own.
        threading.Thread(target=self._forward, name="stop-request", daemon=True).start()
        previous = signal.getsignal(signal.SIGTERM)

        def request(*_: Any) -> None:
            self._signalled.set()
            signal.signal(signal.SIGTERM, previous)

        signal.signal(signal.SIGTERM, request)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, previous)

    def _forward(self) -> None:
        self._signalled.wait()
        logger.warning("SIGTERM: the workers commit after their current step and leave; a second SIGTERM ends this at once")
        ray.get(self._actor.make.remote())

    def should_leave(self) -> bool:
        """Whether the workers shall commit and leave: a request was made, or Ray takes one of their nodes away. Every worker must ask."""
        is_first = ray.train.get_context().get_world_rank() == 0
        is_made = ray.get(self._actor.is_made.remote()) if is_first else False
        is_preempted = ray.train.get_preemption_info() is not None
        return ray.train.collective.broadcast_from_rank_zero(is_made) or is_preempted

    def __reduce__(self) -> Any:  # the event belongs to the driver
        return _restored, (self._actor,)


def _restored(actor: Any) -> StopRequest:
    request = StopRequest.__new__(StopRequest)
    request._actor, request._signalled = actor, threading.Event()
    return request


class Stopped(TesseraError):
    """A job left before its end because it was asked to."""
