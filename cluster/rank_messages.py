"""What ranks tell each other: once per step in one collective, single values, and that they are through with slow work."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

WAIT_SECONDS = 1.0


@dataclass(frozen=True)
class RankMessage:
    """One rank's part of a step.

    Attributes:
        loss: summed over this rank's rows, in nats.
        digest: of the rows it consumed, 64 bits.
        has_published: its part of the latest checkpoint is where it belongs.
        looks_around: all ranks shall look whether to leave; rank 0 decides when.
        wants_commit: all ranks shall commit after this step; rank 0 decides when.
    """

    loss: float
    digest: int
    has_published: bool
    looks_around: bool
    wants_commit: bool


def exchange(message: RankMessage, device: torch.device) -> list[RankMessage]:
    """Every rank's message, in order of rank, on every rank."""
    # float64 carries the loss whole and the digest in two halves that it holds exactly.
    flags = [float(message.has_published), float(message.looks_around), float(message.wants_commit)]
    values = [message.loss, float(message.digest >> 32), float(message.digest & 0xFFFFFFFF), *flags]
    sent = torch.tensor(values, dtype=torch.float64, device=device)
    received = [torch.empty_like(sent) for _ in range(dist.get_world_size())]
    dist.all_gather(received, sent)
    return [_unpacked(values) for values in torch.stack(received).tolist()]


def _unpacked(values: list[float]) -> RankMessage:
    loss, high, low, *flags = values
    return RankMessage(loss, (int(high) << 32) | int(low), *(bool(flag) for flag in flags))


def broadcast(value: Any) -> Any:
    """Rank 0's value on every rank."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def wait_for_all(work: Future[Any], device: torch.device, keep_alive: Callable[[], None]) -> None:
    """Until the work of every rank is done, which must hold no collective. Ranks meet every second, so that one that died is noticed, and a
    slow store is no hang.

    Args:
        work: of this rank.
        device: for collectives.
        keep_alive: called at every meeting.
    """
    while True:
        is_done = torch.tensor(float(work.done()), device=device)
        dist.all_reduce(is_done, dist.ReduceOp.MIN)
        keep_alive()
        if is_done.item():
            return
        wait([work], timeout=WAIT_SECONDS)


def work_together(work: Callable[[], Any], device: torch.device, keep_alive: Callable[[], None]) -> Any:
    """What `work` gives on this rank, once every rank is through with its own; see `wait_for_all`."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        future = pool.submit(work)
        wait_for_all(future, device, keep_alive)
        return future.result()
