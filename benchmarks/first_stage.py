"""The encoder of the f16 VQGAN at 256 x 256: as shipped, beside the original's code as it is, and the peak of matrix products.

python benchmarks/first_stage.py [--num-threads 1 2] [--num-images 4] [--repeats 5]

Both have the same random weights and see the same images. Every way has a process of its own, and all of them take turns; figures
are medians over the repeats, ratios are medians of the ratios of one turn. It needs what `make .venv/.dev` installs.

original     `VQModel.encode` of taming-transformers-rom1504 0.0.6 under no_grad, fp32
as shipped   `pipeline.encoding.encode_views`, as `tokenize` calls it, fp32 and bf16
"""

import sys

if not __package__:  # run as a file: this folder would hide Python's own module `tokenize`
    sys.path[0] = sys.path[0].rpartition("/")[0]

import argparse
import functools
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from cluster.peak_flops import measured_peak_flops
from pipeline.encoding import encode_views, prepare_tokenizer
from pipeline.probe import golden_images
from stages.first_stage.pixels import to_float
from stages.first_stage.tokenizer import Tokenizer
from stages.first_stage.tokenizer_config import TokenizerConfig
from stages.memory import keep_freed_memory
from stages.options import CodesOptions

SIZE = 256
CONFIG = TokenizerConfig(
    resolution=SIZE,
    in_channels=3,
    codebook_size=1024,
    codebook_dim=256,
    base_channels=128,
    channel_multipliers=(1, 1, 2, 2, 4),
    num_res_blocks=2,
    attention_resolutions=(16,),
    z_channels=256,
)
WAYS = ("original", "fp32", "bf16")
DTYPES = {"original": torch.float32, "fp32": torch.float32, "bf16": torch.bfloat16}

PREPARED: list[Callable[[], np.ndarray]] = []  # of this process: encodes its images


def make_tokenizer() -> Tokenizer:
    """The network with PyTorch's initial weights, and a codebook of vectors like those the encoder puts out."""
    torch.manual_seed(0)
    tokenizer = Tokenizer(CONFIG).eval().requires_grad_(False)
    tokenizer.quantize.embedding.weight.normal_(std=0.1)
    return tokenizer


def prepare(way: str, num_images: int, num_threads: int) -> None:
    """Makes this process ready to encode."""
    torch.set_num_threads(num_threads)
    views = golden_images(SIZE, CONFIG.in_channels)[:num_images]
    tokenizer = make_tokenizer()
    if way == "original":
        original, images = _original(tokenizer), to_float(torch.from_numpy(views)).contiguous()
        PREPARED.append(functools.partial(_encode_original, original, images))
        return
    keep_freed_memory()
    tokenizer = prepare_tokenizer(tokenizer, torch.device("cpu"))
    options = CodesOptions(encode_batch_size=num_images, encode_precision=way)  # type: ignore[arg-type]
    PREPARED.append(functools.partial(encode_views, tokenizer, views, options))


def _original(tokenizer: Tokenizer) -> torch.nn.Module:
    sys.path.append(os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "tests"))
    from oracles import taming

    network = dict(
        double_z=False,
        z_channels=CONFIG.z_channels,
        resolution=SIZE,
        in_channels=3,
        out_ch=3,
        ch=CONFIG.base_channels,
        ch_mult=list(CONFIG.channel_multipliers),
        num_res_blocks=CONFIG.num_res_blocks,
        attn_resolutions=list(CONFIG.attention_resolutions),
        dropout=0.0,
    )
    loss = {"target": "taming.modules.losses.vqperceptual.DummyLoss"}
    model = taming("models.vqgan").VQModel(network, loss, CONFIG.codebook_size, CONFIG.codebook_dim)
    model.load_state_dict(tokenizer.state_dict())
    return model.eval()


@torch.no_grad()
def _encode_original(model: torch.nn.Module, images: torch.Tensor) -> np.ndarray:
    return model.encode(images)[2][2].view(len(images), -1).numpy()


def run() -> tuple[float, np.ndarray]:
    """Seconds of one pass over the images, and their codes."""
    started = time.perf_counter()
    codes = PREPARED[0]()
    return time.perf_counter() - started, codes


def peak(way: str, num_threads: int) -> float:
    """FLOP/s of matrix products in this process."""
    return measured_peak_flops(DTYPES[way], num_threads)


def flop_per_image() -> int:
    """Of the encoder and the search for the nearest entries."""
    tokenizer, image = make_tokenizer(), torch.zeros(1, CONFIG.in_channels, SIZE, SIZE)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        tokenizer.encode(image)
    return counter.get_total_flops()


def measure(num_images: int, num_threads: int, repeats: int) -> None:
    """Prints the comparison for one number of threads."""
    context = multiprocessing.get_context("spawn")
    pools = {
        way: ProcessPoolExecutor(1, context, initializer=prepare, initargs=(way, num_images, num_threads))
        for way in WAYS
    }
    try:
        codes = {way: pool.submit(run).result()[1] for way, pool in pools.items()}  # also warms up
        turns, peaks = [], []
        for _ in range(repeats):
            peaks.append({way: pool.submit(peak, way, num_threads).result() for way, pool in pools.items()})
            turns.append({way: pool.submit(run).result()[0] for way, pool in pools.items()})
    finally:
        for pool in pools.values():
            pool.shutdown()
    work = flop_per_image() * num_images
    for way in WAYS:
        seconds = statistics.median(turn[way] for turn in turns)
        ratio = statistics.median(turn["original"] / turn[way] for turn in turns)
        share = statistics.median(work / turn[way] / found[way] for turn, found in zip(turns, peaks))
        same = np.mean(codes[way] == codes["original"])
        print(
            f"{num_threads} thread(s), {way}: {num_images / seconds:.2f} images/s, {ratio:.2f} x, {share:.0%} of the peak of "
            f"{statistics.median(found[way] for found in peaks) / 1e9:.0f} GFLOP/s; {same:.2%} of codes as the original",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--num-images", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    print(f"{flop_per_image() / 1e9:.0f} GFLOP per image of {SIZE} x {SIZE}, {args.num_images} images at once")
    for num_threads in args.num_threads:
        measure(args.num_images, num_threads, args.repeats)


if __name__ == "__main__":
    main()
