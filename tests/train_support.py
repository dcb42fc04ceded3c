"""The training loop in real process groups without Ray, on a tiny code dataset: gloo, or NCCL where there is a GPU."""

import multiprocessing
import os
import socket

import torch
import torch.distributed as dist
import torch.multiprocessing
from code_dataset_support import Recipe
from tests_support import tiny_config

from cluster import checkpoints, run_log
from cluster.train_loop import train_worker
from cluster.train_options import TrainJobOptions
from stages.config import select_sections

RECIPE = Recipe(num_images=22, bad_images=(), grid=(4, 4), codebook_size=32)

# The server imports the slow libraries once; every worker is a fork of it.
multiprocessing.get_context("forkserver").set_forkserver_preload(["deepspeed", "cluster.train_loop", "tests_support"])


def nothing():
    """A way to prepare a worker: none."""


def never():
    """Whether to leave."""
    return False


def worker(rank, world_size, port, options, prepare, should_leave, loop):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ["WORLD_SIZE"] = str(world_size)
    prepare()
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, rank=rank, world_size=world_size)
    loop(options, 1, should_leave)
    dist.destroy_process_group()


def start(options, world_size, prepare=nothing, should_leave=never, loop=train_worker):
    """Starts the loop in `world_size` processes; each calls `prepare` first. The functions must be importable."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    arguments = (world_size, port, options, prepare, should_leave, loop)
    method = "spawn" if torch.cuda.is_available() else "forkserver"  # CUDA does not survive a fork
    return torch.multiprocessing.start_processes(worker, arguments, nprocs=world_size, start_method=method, join=False)


def train(options, world_size, prepare=nothing, should_leave=never):
    """Runs the loop to its end and returns the run's latest commit; raises what a worker raised."""
    processes = start(options, world_size, prepare, should_leave)
    # A rank that outlives another finds out by itself, as it would in a cluster: it may be about to commit.
    while not processes.join(grace_period=20.0):
        pass
    return checkpoints.latest_commit(options.run.path)


def options_for(folder, codes, **sections):
    """Options of a tiny run in a folder."""
    sections["codes"] = {"path": codes, **sections.get("codes", {})}
    return select_sections(TrainJobOptions, tiny_config(folder, **sections))


def log_of(commit):
    """Records of all steps behind a commit."""
    run = os.path.dirname(os.path.dirname(commit.path))
    return run_log.read_log(run, commit.content["log"])


def losses(commit):
    """Loss of every step behind a commit."""
    return [record["loss"] for record in log_of(commit)]
