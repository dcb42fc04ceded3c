"""Training the second stage: as shipped, beside the original's GPT, a bare PyTorch loop, and the peak of matrix products.

python benchmarks/train.py [section.key=value …] [--num-threads 2 1] [--num-rows 32] [--num-steps 4] [--repeats 3]

Every measurement is a process of its own, one after the other, and all of them take turns; figures are medians over the repeats.

original     the GPT of Taming Transformers with its AdamW groups, fp32, in a plain loop; with dropout 0.1, as its configurations of
             scenes have it, and without, as its other ones.
bare loop    the same transformer as shipped and fused AdamW in a plain loop; with bf16, fp32 master weights and moments. Gradients
             are clipped as shipped.
as shipped   `cluster.train_loop`: loader, DeepSpeed ZeRO 1, checks, logs, live views.

Codes are random, and in memory but for the run as shipped. With train.checkpoint_every_seconds=60, and enough steps, that one commits
while it is measured. The last 2 of a run's steps and the first 2 do not count.

On a GPU the peak is that of its data sheet in bf16, and the blocks of ours are compiled unless train.compile=false.
"""

import sys

if not __package__:  # run as a file: this folder would hide Python's own module `tokenize`
    sys.path[0] = sys.path[0].rpartition("/")[0]

import argparse
import dataclasses
import logging
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.loader import CODEBOOK_SIZE, GRID, write_dataset
from cluster.deepspeed_engine import compile_blocks
from cluster.estimates import row_flop
from cluster.peak_flops import gpu_peak_flops, measured_peak_flops
from cluster.step_timer import CHECKPOINT, DATA
from cluster.train_loop import train_worker
from cluster.train_metrics import read_metrics
from cluster.train_options import TrainJobOptions
from stages.config import load_config, select_sections
from stages.memory import keep_freed_memory
from stages.second_stage.transformer import Transformer, TransformerConfig, nll, parameter_groups, transformer_config

NUM_LAYERS, HIDDEN_SIZE, NUM_HEADS, NUM_CODES = 12, 512, 8, GRID[0] * GRID[1]
NUM_WARM_UP, NUM_COOL_DOWN, NUM_DATASET_ROWS = 2, 2, 4096
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """What is measured: how, on how many rows per step, for how many steps, with which options on top."""

    precision: str = "fp32"
    dropout: float
    num_threads: int
    num_rows: int
    num_steps: int
    overrides: tuple[str, ...] = ()

    def config(self, folder: str):
        """The whole configuration of a run in a folder."""
        sections = [
            f"run.path={folder}/run",
            f"codes.path={folder}/codes",
            "conditioning.name=none",
            f"model.num_layers={NUM_LAYERS}",
            f"model.hidden_size={HIDDEN_SIZE}",
            f"model.num_heads={NUM_HEADS}",
            f"model.residual_dropout={self.dropout}",
            f"model.embedding_dropout={self.dropout}",
            f"train.global_batch_size={self.num_rows}",
            f"train.micro_batch_size={self.num_rows}",
            f"train.precision={self.precision}",
            f"train.num_steps={NUM_WARM_UP + self.num_steps + NUM_COOL_DOWN}",
            "train.checkpoint_every_steps=1000000",
        ]
        return load_config((), [*sections, *self.overrides])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """Median seconds of a step, the shares of all seconds that went into waiting, and the peak FLOP/s in the same process."""

    seconds: float
    peak_flops: float
    data_share: float = 0.0
    checkpoint_share: float = 0.0


def transformer_of(setting: Setting) -> TransformerConfig:
    config = setting.config("")
    return transformer_config(config.model, config.conditioning, codebook_size=CODEBOOK_SIZE, grid=GRID, num_classes=0)


def measure_loop(setting: Setting, steps: Iterator[float]) -> Measured:
    """Times steps that each end by handing over their loss."""
    seconds, started = [], time.perf_counter()
    for _ in range(NUM_WARM_UP + setting.num_steps):
        next(steps)
        seconds.append(time.perf_counter() - started)
        started = time.perf_counter()
    return Measured(seconds=statistics.median(seconds[NUM_WARM_UP:]), peak_flops=peak_flops(setting))


def peak_flops(setting: Setting) -> float:
    """FLOP/s of matrix products: as measured now on a CPU, by the data sheet on a GPU, there always in bf16."""
    if DEVICE.type == "cuda":
        return gpu_peak_flops(torch.cuda.get_device_name()) or float("nan")
    return measured_peak_flops(DTYPES[setting.precision], setting.num_threads)


def random_codes(setting: Setting) -> Iterator[Tensor]:
    """Batches (rows, 256) for ever."""
    while True:
        yield torch.randint(CODEBOOK_SIZE, (setting.num_rows, NUM_CODES), device=DEVICE)


def original(setting: Setting, folder: str) -> Measured:
    """The original's GPT: the condition's token, then all codes but the last."""
    torch.set_num_threads(setting.num_threads)
    sys.path.append(os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "tests"))
    from oracles import taming

    dropouts = dict.fromkeys(("embd_pdrop", "resid_pdrop", "attn_pdrop"), setting.dropout)
    ours = setting.config(folder).model
    sizes = {"n_layer": ours.num_layers, "n_head": ours.num_heads, "n_embd": ours.hidden_size}
    model = taming("modules.transformer.mingpt").GPT(CODEBOOK_SIZE, NUM_CODES, **sizes, **dropouts).to(DEVICE)
    decayed = [m.weight for m in model.modules() if isinstance(m, nn.Linear)]
    others = [p for p in model.parameters() if not any(p is weight for weight in decayed)]
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95))
    condition = torch.zeros(setting.num_rows, 1, dtype=torch.long, device=DEVICE)

    def steps() -> Iterator[float]:
        for codes in random_codes(setting):
            logits, _ = model(torch.cat([condition, codes], dim=1)[:, :-1])
            loss = F.cross_entropy(logits.reshape(-1, logits.size(-1)), codes.reshape(-1))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            yield loss.item()

    return measure_loop(setting, steps())


def bare_loop(setting: Setting, folder: str) -> Measured:
    """Our transformer in a plain loop."""
    keep_freed_memory()
    torch.set_num_threads(setting.num_threads)
    config, dtype = setting.config(folder), DTYPES[setting.precision]
    model = Transformer(transformer_of(setting)).to(DEVICE, dtype).train()
    compile_blocks(model, config.train, config.deepspeed)
    weights = list(model.parameters())
    masters = weights if dtype == torch.float32 else [weight.detach().float() for weight in weights]
    master_of = {weight: master for weight, master in zip(weights, masters)}
    groups = parameter_groups(model, config.optim.weight_decay)
    for group in groups:
        group["params"] = [master_of[weight] for weight in group["params"]]
    optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), fused=True)
    labels = torch.full((setting.num_rows,), -1, device=DEVICE)

    def steps() -> Iterator[float]:
        for codes in random_codes(setting):
            loss = nll(model(codes, labels), codes).sum() / codes.numel()
            loss.backward()
            if masters is not weights:
                for master, weight in zip(masters, weights):
                    master.grad, weight.grad = weight.grad.float(), None
            nn.utils.clip_grad_norm_(masters, config.optim.grad_clip)
            optimizer.step()
            optimizer.zero_grad()
            if masters is not weights:
                with torch.no_grad():
                    torch._foreach_copy_(weights, masters)
            yield loss.item()

    return measure_loop(setting, steps())


def as_shipped(setting: Setting, folder: str) -> Measured:
    """Our training loop on a code dataset, in a process group of one."""
    logging.disable(logging.WARNING)
    write_dataset(
        f"{folder}/codes", np.random.default_rng(0).integers(0, CODEBOOK_SIZE, (NUM_DATASET_ROWS, NUM_CODES), np.uint16)
    )
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    backend = "nccl" if DEVICE.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{folder}/rendezvous", rank=0, world_size=1)
    train_worker(select_sections(TrainJobOptions, setting.config(folder)), setting.num_threads)
    dist.destroy_process_group()
    lines = read_metrics(f"{folder}/run")[NUM_WARM_UP:-NUM_COOL_DOWN]
    total = sum(line["seconds"] for line in lines)
    return Measured(
        seconds=statistics.median(line["seconds"] for line in lines),
        data_share=sum(line["part_seconds"][DATA] for line in lines) / total,
        checkpoint_share=sum(line["part_seconds"][CHECKPOINT] for line in lines) / total,
        peak_flops=peak_flops(setting),
    )


CONTENDERS: dict[str, tuple[Callable[[Setting, str], Measured], dict]] = {
    "original, dropout 0.1": (original, {"dropout": 0.1}),
    "original, no dropout": (original, {"dropout": 0.0}),
    "bare loop, fp32": (bare_loop, {"dropout": 0.1}),
    "as shipped, fp32": (as_shipped, {"dropout": 0.1}),
    "as shipped, fp32, no dropout": (as_shipped, {"dropout": 0.0}),
    "bare loop, bf16": (bare_loop, {"dropout": 0.1, "precision": "bf16"}),
    "as shipped, bf16": (as_shipped, {"dropout": 0.1, "precision": "bf16"}),
    "as shipped, bf16, no dropout": (as_shipped, {"dropout": 0.0, "precision": "bf16"}),
}
RATIOS = [
    ("as shipped, fp32", "original, dropout 0.1"),
    ("as shipped, fp32, no dropout", "original, no dropout"),
    ("as shipped, bf16", "original, dropout 0.1"),
    ("as shipped, bf16, no dropout", "original, no dropout"),
    ("as shipped, fp32", "bare loop, fp32"),
    ("as shipped, bf16", "bare loop, bf16"),
]


def in_own_process(function: Callable[[Setting, str], Measured], setting: Setting) -> Measured:
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, setting, folder).result()


def median(measured: list[Measured], field: str) -> float:
    return statistics.median(getattr(one, field) for one in measured)


def show(measured: dict[str, list[Measured]], num_rows: int, flop_per_row: int) -> None:
    """Prints a line per contender, then the ratios."""
    for name, repeats in measured.items():
        seconds = median(repeats, "seconds")
        line = f"{name:30} {num_rows * NUM_CODES / seconds:7.0f} codes/s ({seconds:.2f} s per step"
        line += f", {min(m.seconds for m in repeats):.2f} to {max(m.seconds for m in repeats):.2f})"
        if not name.startswith("original"):
            peak = median(repeats, "peak_flops")
            line += f", {num_rows * flop_per_row / seconds / peak:.1%} of {peak / 1e9:.0f} GFLOP/s"
        if name.startswith("as shipped"):
            line += f", loader stall {median(repeats, 'data_share'):.3%}"
            line += f", checkpoint stall {median(repeats, 'checkpoint_share'):.3%}"
        print(line)
    for ours, theirs in RATIOS:
        if ours in measured and theirs in measured:
            # Neighbours in time are compared, so that a slow minute of the machine slows both.
            pairs = zip(measured[theirs], measured[ours])
            print(f"{ours} / {theirs}: {statistics.median(b.seconds / a.seconds for b, a in pairs):.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="for the runs as shipped and the bare loop"
    )
    parser.add_argument("--num-threads", type=int, nargs="+", default=[2, 1])
    parser.add_argument("--num-rows", type=int, default=32, help="per step")
    parser.add_argument("--num-steps", type=int, default=4, help="that count, per run")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="+", default=list(CONTENDERS), choices=list(CONTENDERS), metavar="NAME")
    args = parser.parse_args()
    for num_threads in args.num_threads:
        measured: dict[str, list[Measured]] = {name: [] for name in CONTENDERS}
        sizes = {"num_threads": num_threads, "num_rows": args.num_rows, "num_steps": args.num_steps}
        for _ in range(args.repeats):
            for name in args.only:
                function, changes = CONTENDERS[name]
                setting = Setting(**sizes, **changes, overrides=tuple(args.overrides))
                measured[name].append(in_own_process(function, setting))
        shape = transformer_of(Setting(**sizes, dropout=0.0, overrides=tuple(args.overrides)))
        print(
            f"{num_threads} threads, {args.num_rows} rows per step, {shape.num_layers} layers x {shape.hidden_size}, {NUM_CODES} codes"
        )
        flop = row_flop(shape)
        show({name: repeats for name, repeats in measured.items() if repeats}, args.num_rows, flop)


if __name__ == "__main__":
    main()
