"""The step timer: parts that add up, and collectives found wherever they are called, also inside a DeepSpeed engine."""

import inspect
import multiprocessing
import os
import re
import threading
import time

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from s3_support import free_ports

from cluster.step_timer import COLLECTIVES, PARTS, StepTimer

# The server imports the slow libraries once; every worker is a fork of it.
multiprocessing.get_context("forkserver").set_forkserver_preload(["deepspeed", "cluster.step_timer"])


def measured(timer, step):
    """The parts of one step, after checking that they add up to its time on another pair of clocks."""
    before = time.perf_counter()
    timer.finish()
    start = time.perf_counter()
    step()
    end = time.perf_counter()
    seconds = timer.finish()
    after = time.perf_counter()
    assert tuple(seconds) == PARTS
    assert end - start - 1e-6 <= sum(seconds.values()) <= after - before + 1e-6
    return seconds


def test_the_parts_of_a_step_add_up_and_the_inner_one_counts():
    timer = StepTimer()

    def step():
        with timer.part("forward"):
            time.sleep(0.01)
            with timer.part("communication"):
                time.sleep(0.03)
        with timer.part("forward"):
            time.sleep(0.01)
        assert list(timer.each("data", slow_items())) == [0, 1, 2]

    def slow_items():
        for i in range(3):
            time.sleep(0.01)
            yield i

    seconds = measured(timer, step)
    assert seconds["forward"] >= 0.02 and seconds["communication"] >= 0.03 and seconds["data"] >= 0.03
    assert seconds["backward"] == seconds["optimizer"] == seconds["checkpoint"] == 0.0
    assert sum(timer.finish().values()) < sum(seconds.values())  # the next step begins with nothing


def test_a_step_that_fails_leaves_its_part():
    timer = StepTimer()
    with pytest.raises(ZeroDivisionError), timer.part("forward"):
        raise ZeroDivisionError
    timer.finish()
    time.sleep(0.01)
    assert timer.finish()["other"] >= 0.01


@pytest.fixture
def alone():
    """A gloo group of this process only."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def communicate():
    dist.all_reduce(torch.ones(8))
    dist.all_gather([torch.empty(8)], torch.ones(8), async_op=True).wait()
    dist.all_gather_object([None], "rows")
    dist.barrier()


@pytest.mark.parametrize("part", sorted(PARTS))
def test_collectives_are_communication_in_every_part_but_a_checkpoint(alone, part):
    with StepTimer() as timer:

        def step():
            with timer.part(part):
                communicate()

        seconds = measured(timer, step)
    expected = {part, "other"} | ({"communication"} if part != "checkpoint" else set())
    assert {name for name, value in seconds.items() if value > 0} == expected


def test_collectives_of_a_thread_beside_the_step_are_not_its_communication(alone):
    with StepTimer() as timer:
        thread = threading.Thread(target=communicate)
        thread.start()
        thread.join()
        assert timer.finish()["communication"] == 0.0


def test_torch_is_as_it_was_outside_and_collectives_are_no_longer_seen(alone):
    before = {**vars(dist.ProcessGroup)}, {**vars(dist.Work)}
    with StepTimer() as timer:
        assert {**vars(dist.Work)} != before[1]
    assert ({**vars(dist.ProcessGroup)}, {**vars(dist.Work)}) == before
    communicate()
    assert timer.finish()["communication"] == 0.0


def test_every_collective_of_torch_is_known():
    source = inspect.getsource(dist.distributed_c10d)
    started = set(re.findall(r"(?:work =|return) group\.(\w+)\(", source)) - {"size"}
    assert "allreduce" in started and started <= set(COLLECTIVES)


def train(rank, world_size, port, zero_stage, results):
    import deepspeed

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": str(world_size), "DS_ACCELERATOR": "cpu"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    model = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(4)))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    settings = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": zero_stage, "overlap_comm": False},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    with StepTimer() as timer:

        def step():
            with timer.part("forward"):
                loss = engine(torch.ones(2, 64)).square().mean()
            if rank == 1:
                time.sleep(1.0)
            with timer.part("backward"):
                engine.backward(loss)
            with timer.part("optimizer"):
                engine.step()

        step()
        results.put((rank, measured(timer, step)))
    dist.destroy_process_group()


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_the_communication_of_a_deepspeed_engine_is_seen_and_parts_add_up(zero_stage):
    results = multiprocessing.get_context("forkserver").SimpleQueue()
    (port,) = free_ports(1)
    torch.multiprocessing.start_processes(train, (2, port, zero_stage, results), nprocs=2, start_method="forkserver")
    seconds = dict(results.get() for _ in range(2))
    for rank in range(2):
        assert all(seconds[rank][part] > 0 for part in ("forward", "backward", "optimizer", "communication"))
    # Rank 0 has nothing to do but wait for rank 1.
    assert max(seconds[0], key=seconds[0].get) == "communication"
    assert max(seconds[1], key=seconds[1].get) == "other"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_parts_on_a_gpu_add_up():
    timer = StepTimer(torch.device("cuda"))

    def step():
        with timer.part("forward"):
            torch.randn(1024, 1024, device="cuda") @ torch.randn(1024, 1024, device="cuda")
        torch.cuda.synchronize()

    step()
    assert measured(timer, step)["forward"] > 0
