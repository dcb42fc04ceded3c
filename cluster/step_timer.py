"""Where the wall time of a training step goes.

A step is cut into consecutive spans, each of which belongs to one part, so parts add up to the step. Collectives of
torch.distributed are a part of their own wherever they happen: they are seen at the two places that every one of them passes, the
methods of a process group, which start it, and `Work.wait`, which waits for it. DeepSpeed's own communication log is not used: it
synchronises the device after every operation and does not see a wait for an asynchronous one.
"""

import functools
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist

DATA, FORWARD, BACKWARD, OPTIMIZER = "data", "forward", "backward", "optimizer"
COMMUNICATION, CHECKPOINT, OTHER = "communication", "checkpoint", "other"
PARTS = (DATA, FORWARD, BACKWARD, OPTIMIZER, COMMUNICATION, CHECKPOINT, OTHER)

# Methods of torch.distributed.ProcessGroup that start communication.
COLLECTIVES = (
    "all_gather_single",
    "all_gather_single_coalesced",
    "all_to_all_single",
    "allgather",
    "allgather_coalesced",
    "allreduce",
    "allreduce_coalesced",
    "alltoall",
    "barrier",
    "broadcast",
    "gather",
    "monitored_barrier",
    "recv",
    "recv_anysource",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_single",
    "reduce_scatter_single_coalesced",
    "scatter",
    "send",
    "_end_coalescing",
)

T = TypeVar("T")


class StepTimer:
    """Times the parts of one step after another, on one rank.

        with StepTimer(device) as timer:  # inside, collectives are seen
            for batch in timer.each("data", loader):
                with timer.part("forward"):
                    ...
                seconds = timer.finish()

    A collective counts as communication from its start to the end of the wait for it: on gloo also the wait for slower ranks; on
    CUDA the time that it keeps the compute stream, so that communication hidden behind computation costs nothing. Collectives
    inside the checkpoint part remain part of it: a barrier there is a wait for the storage of another rank.

    On CUDA the parts are measured on the device, between events on the stream that was current at construction, and only `finish`
    waits for the device. Call it after something else has waited (reading the loss), and it waits for next to nothing.
    """

    def __init__(self, device: torch.device | None = None):
        self._clock = _StreamClock(device) if device is not None and device.type == "cuda" else _HostClock()
        self._thread = threading.get_ident()
        self._restore: list[Callable[[], None]] = []
        self._part, self._since = OTHER, self._clock.now()
        self._spans: list[tuple[str, Any, Any]] = []

    def __enter__(self) -> "StepTimer":
        self._restore = [_wrap(dist.Work, "wait", self._collective)]
        known = [name for name in COLLECTIVES if hasattr(dist.ProcessGroup, name)]  # versions of torch differ
        self._restore += [_wrap(dist.ProcessGroup, name, self._collective) for name in known]
        return self

    def __exit__(self, *exception: object) -> None:
        for restore in self._restore:
            restore()
        self._restore = []

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """The time inside is that part's; a part inside another is cut out of it."""
        assert name in PARTS, name
        outer = self._switch(name)
        try:
            yield
        finally:
            self._switch(outer)

    def each(self, name: str, items: Iterable[T]) -> Iterator[T]:
        """The same items; the time to get each is that part's."""
        iterator = iter(items)
        while True:
            with self.part(name):
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item

    def finish(self) -> dict[str, float]:
        """Ends the step and starts the next: seconds of each of PARTS, which add up to the step."""
        self._switch(self._part)
        self._clock.wait_for(self._since)
        seconds = dict.fromkeys(PARTS, 0.0)
        for name, start, end in self._spans:
            seconds[name] += self._clock.seconds(start, end)
        self._spans = []
        return seconds

    def _switch(self, name: str) -> str:
        """Starts a part and returns the one that it ends."""
        now, ended = self._clock.now(), self._part
        self._spans.append((ended, self._since, now))
        self._part, self._since = name, now
        return ended

    def _collective(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        outer = self._part
        # On CUDA, autograd runs DeepSpeed's gradient hooks on a thread of its own. Any other thread works beside the step.
        is_in_step = threading.get_ident() == self._thread or outer == BACKWARD
        if not is_in_step or outer in (COMMUNICATION, CHECKPOINT) or not self._clock.is_current():
            return function(*args, **kwargs)
        self._switch(COMMUNICATION)
        try:
            return function(*args, **kwargs)
        finally:
            self._switch(outer)


class _HostClock:
    """Times on the host, where work is done when its call returns."""

    def now(self) -> float:
        return time.perf_counter()

    def is_current(self) -> bool:
        return True

    def wait_for(self, mark: float) -> None:
        pass

    def seconds(self, start: float, end: float) -> float:
        return end - start


class _StreamClock:
    """Times on a CUDA stream, where a mark is passed when the work before it is done."""

    def __init__(self, device: torch.device):
        self._device = device
        self._stream = torch.cuda.current_stream(device)

    def now(self) -> Any:
        mark = torch.cuda.Event(enable_timing=True)
        mark.record(self._stream)
        return mark

    def is_current(self) -> bool:
        """Whether the caller's work goes to this stream; a collective on another one runs beside the step."""
        return torch.cuda.current_stream(self._device) == self._stream

    def wait_for(self, mark: Any) -> None:
        mark.synchronize()

    def seconds(self, start: Any, end: Any) -> float:
        return start.elapsed_time(end) / 1000


def _wrap(cls: Any, name: str, around: Callable[..., Any]) -> Callable[[], None]:
    """Lets a method of a class run through `around(method, self, …)`; returns what undoes it."""
    original, method = vars(cls)[name], getattr(cls, name)  # what pybind11 stores is not what it gives

    @functools.wraps(method)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return around(method, *args, **kwargs)

    setattr(cls, name, wrapper)
    return functools.partial(setattr, cls, name, original)
