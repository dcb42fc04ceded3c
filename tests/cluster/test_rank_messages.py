"""What ranks tell each other, in real process groups."""

import os
import time

import torch
import torch.distributed as dist
import torch.multiprocessing

from cluster import rank_messages
from cluster.rank_messages import RankMessage, broadcast, exchange, work_together


def group(rank, world_size, function, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=world_size)
    function(rank, folder)
    dist.destroy_process_group()


def run(function, folder, world_size=2):
    """Calls `function(rank, folder)` on every rank; it must be importable."""
    arguments = (world_size, function, str(folder))
    torch.multiprocessing.start_processes(group, arguments, nprocs=world_size, start_method="forkserver")


def exchange_and_broadcast(rank, folder):
    message = RankMessage(0.1 + rank, 2**63 + rank, has_published=rank == 1, looks_around=rank == 0, wants_commit=False)
    received = exchange(message, torch.device("cpu"))
    assert received[rank] == message and [each.digest for each in received] == [2**63, 2**63 + 1]
    assert broadcast(rank + 7) == 7


def test_messages_arrive_whole(tmp_path):
    run(exchange_and_broadcast, tmp_path)


def work_longer_on_the_first_rank(rank, folder):
    rank_messages.WAIT_SECONDS = 0.05
    meetings, done = [], os.path.join(folder, "done")

    def work():
        while rank == 0 and len(meetings) < 5:
            time.sleep(0.01)
        if rank == 0:
            open(done, "w").close()
        return rank

    assert work_together(work, torch.device("cpu"), lambda: meetings.append(None)) == rank
    assert os.path.exists(done) and len(meetings) >= 5


def test_ranks_that_wait_for_slow_work_are_kept_alive(tmp_path):
    run(work_longer_on_the_first_rank, tmp_path)
