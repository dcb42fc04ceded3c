"""Memory per rank by ZeRO stage: what `plan` says beside what processes on this machine measure.

python benchmarks/memory.py [section.key=value …] [--world-sizes 2 4] [--zero-stages 0 1 2 3] [--as-trained]

Every rank is a process of one thread that builds the engine and takes three steps on random codes. Measured is the peak of its resident
memory over what it had after imports, process group and a model of one layer of the same width. For that, arrays are mapped, so that
freed memory is not counted; --as-trained keeps freed memory, as the training loop does for speed.
"""

import sys

if not __package__:  # run as a file: this folder would hide Python's own module `tokenize`
    sys.path[0] = sys.path[0].rpartition("/")[0]

import argparse
import ctypes
import dataclasses
import gc
import logging
import multiprocessing
import os
import socket
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

from cluster.deepspeed_engine import build_engine
from cluster.estimates import RankMemory, rank_memory
from cluster.job_plan import planned_transformer
from stages.config import load_config
from stages.memory import keep_freed_memory
from stages.options import Config, DeepSpeedOptions
from stages.second_stage.transformer import TransformerConfig, nll, num_parameters

NUM_CLASSES, NUM_STEPS, WARM_UP_ELEMENTS = 10, 3, 5_000_000
M_MMAP_THRESHOLD, MAPPED_FROM_BYTES = -3, 1 << 16  # mallopt
# 64 codes a row keep activations small beside 54 million parameters, of which buckets hold a fraction as they do in large models.
MODEL = [
    "images.size=32",
    "tokenizer.channel_multipliers=[1, 2, 2]",
    "model.num_layers=16",
    "model.hidden_size=512",
    "model.num_heads=8",
    "model.ffn_size=1408",
    "train.micro_batch_size=2",
    "deepspeed.bucket_size=4000000",
]

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["deepspeed", "benchmarks.memory"])


def status_bytes(field: str) -> int:
    """A size in this process's status: VmRSS, now resident; VmHWM, its peak."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith(field))


def train_steps(config: Config, transformer: TransformerConfig, deepspeed: DeepSpeedOptions) -> int:
    """Builds an engine and takes a few steps with it. Returns the bytes of its model state before the last one."""
    world_size, state = dist.get_world_size(), 0
    engine = build_engine(transformer, 0, config.train, config.optim, deepspeed, world_size)
    engine.train()
    micro_batch_size = config.train.micro_batch_size
    for _ in range(NUM_STEPS * engine.gradient_accumulation_steps()):
        codes = torch.randint(transformer.codebook_size, (micro_batch_size, transformer.num_codes))
        engine.backward(nll(engine(codes, torch.zeros(micro_batch_size, dtype=torch.long)), codes).sum())
        state = model_state_bytes(engine, deepspeed.zero_stage)
        engine.step()
    engine.destroy()
    return state


def model_state_bytes(engine: Any, zero_stage: int) -> int:
    """Bytes of all distinct storages behind weights, gradients and what the optimizer holds."""
    optimizer = engine.optimizer
    inner = getattr(optimizer, "optimizer", optimizer)
    parameters = list(engine.module.parameters())
    tensors = [parameter.ds_tensor if zero_stage == 3 else parameter.data for parameter in parameters]
    if zero_stage == 0:
        tensors += [parameter.grad for parameter in parameters if parameter.grad is not None]
    elif zero_stage == 3:
        tensors.append(optimizer.grad_partitions_flat_buffer)
    else:
        tensors += [gradient for group in optimizer.averaged_gradients.values() for gradient in group or ()]
    for weight, state in inner.state.items():
        tensors += [weight, *(value for value in state.values() if torch.is_tensor(value))]
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def measure_rank(rank: int, world_size: int, port: int, config: Config, as_trained: bool, results: Any) -> None:
    """One rank: puts (peak bytes, model state bytes) into `results`."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ["WORLD_SIZE"] = str(world_size)
    logging.disable(logging.WARNING)
    if as_trained:
        keep_freed_memory()
    else:
        ctypes.CDLL("libc.so.6").mallopt(M_MMAP_THRESHOLD, MAPPED_FROM_BYTES)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    transformer = planned_transformer(config, NUM_CLASSES)
    train_steps(config, dataclasses.replace(transformer, num_layers=1), config.deepspeed)
    dist.all_reduce(torch.ones(WARM_UP_ELEMENTS))
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak starts again from here
    before = status_bytes("VmRSS")
    state = train_steps(config, transformer, config.deepspeed)
    results.put((status_bytes("VmHWM") - before, state))
    dist.barrier()
    dist.destroy_process_group()


def measure(world_size: int, config: Config, as_trained: bool) -> tuple[int, int]:
    """The largest (peak bytes, model state bytes) of a rank."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    results = context.SimpleQueue()
    torch.multiprocessing.start_processes(
        measure_rank, (world_size, port, config, as_trained, results), nprocs=world_size, start_method="forkserver"
    )
    measured = [results.get() for _ in range(world_size)]
    return max(peak for peak, _ in measured), max(state for _, state in measured)


def predict(world_size: int, config: Config) -> RankMemory:
    """What `plan` says."""
    return rank_memory(
        planned_transformer(config, NUM_CLASSES),
        config.train,
        config.optim,
        config.deepspeed,
        zero_stage=config.deepspeed.zero_stage,
        world_size=world_size,
        use_gpu=False,
        checkpointing=config.train.activation_checkpointing,
    )


def configure(overrides: list[str], world_size: int, zero_stage: int, num_accumulated: int) -> Config:
    """The configuration of one line of the table."""
    config = load_config((), MODEL + overrides)
    batch = config.train.micro_batch_size * world_size * num_accumulated
    return dataclasses.replace(
        config,
        train=dataclasses.replace(config.train, global_batch_size=batch),
        deepspeed=dataclasses.replace(config.deepspeed, zero_stage=zero_stage),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world-sizes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--zero-stages", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--num-accumulated", type=int, default=1, help="micro batches per step")
    parser.add_argument("--as-trained", action="store_true", help="keep freed memory, as the training loop does")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_args()
    for precision in args.precisions:
        for world_size in args.world_sizes:
            whole = 0
            for stage in args.zero_stages:
                overrides = args.overrides + [f"train.precision={precision}"]
                config = configure(overrides, world_size, stage, args.num_accumulated)
                predicted, (peak, state) = predict(world_size, config), measure(world_size, config, args.as_trained)
                whole = state if stage == 0 else whole
                parameters = num_parameters(planned_transformer(config, NUM_CLASSES))
                share = f"; model state {state / whole:.0%} of stage 0's" if whole else ""
                print(
                    f"{precision}, W = {world_size}, ZeRO-{stage}, {parameters / 1e6:.1f} M parameters: peak predicted "
                    f"{predicted.peak / 1e6:.0f} MB ({predicted.phase}), measured {peak / 1e6:.0f} MB, ratio "
                    f"{peak / predicted.peak:.3f}; model state {state / 1e6:.0f} MB{share}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
