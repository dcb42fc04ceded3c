"""Local folders that the ranks of a node share while they read a checkpoint, filled once per node."""

import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from cluster import checkpoints
from cluster.rank_messages import work_together
from pipeline import storage
from stages.errors import TesseraError


@contextmanager
def fetched(
    commit: checkpoints.Commit,
    names: Callable[[Collection[int]], list[str]],
    device: torch.device,
    keep_alive: Callable[[], None],
) -> Iterator[str]:
    """A local folder with the files of a commit that the ranks of this node need."""
    if storage.is_local(commit.path):
        yield commit.path
        return
    with node_folder(lambda folder, ranks: checkpoints.download(commit, folder, names(ranks)), device, keep_alive) as folder:
        yield folder


@contextmanager
def node_folder(
    fill: Callable[[str, Collection[int]], None], device: torch.device, keep_alive: Callable[[], None]
) -> Iterator[str]:
    """A local folder that is filled once per node, given the node's ranks, and removed when they have read it. Every rank must call it.

    Raises:
        TesseraError: on every rank, when it could not be filled on some node.
    """
    node, rank = os.environ.get("NODE_RANK", "0"), dist.get_rank()
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, node)
    ranks = [other for other, place in enumerate(everyone) if place == node]
    made = tempfile.mkdtemp(prefix="tessera-resume-") if ranks[0] == rank else None
    try:
        error = work_together(lambda: None if made is None else _fault(fill, made, ranks), device, keep_alive)
        dist.all_gather_object(everyone, (made, error))
        for _, fault in everyone:
            if fault is not None:
                raise fault
        yield everyone[ranks[0]][0]
        dist.barrier()  # no rank of the node reads any more
    finally:
        if made is not None:
            shutil.rmtree(made, ignore_errors=True)


def _fault(fill: Callable[[str, Collection[int]], None], folder: str, ranks: Collection[int]) -> TesseraError | None:
    """Fills a folder; returns the error, so that other ranks can be told."""
    try:
        fill(folder, ranks)
    except TesseraError as error:
        return error
    return None
