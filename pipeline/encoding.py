"""The frozen tokenizer at work: uint8 views to codes, in a declared numeric mode and batches of one shape."""

import functools
import platform
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from pipeline.winograd import use_winograd
from stages.first_stage.pixels import to_input
from stages.first_stage.tokenizer import Tokenizer
from stages.options import CodesOptions


def use_parity_mode() -> None:
    """Makes float32 mean float32: no TF32, no cuDNN algorithm that is chosen by timing or sums in a varying order."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True


def prepare_tokenizer(tokenizer: Tokenizer, device: torch.device) -> Tokenizer:
    """A frozen tokenizer on a device, where it computes as is fastest in full float32: on CPUs channels last, which costs a GPU a
    seventh, and by Winograd's convolutions, whose kernels take 16/9 of the memory of the weights besides.

    Codes are those of the tokenizer as it was, but for near ties.
    """
    use_parity_mode()
    if device.type == "cpu":
        use_winograd(tokenizer)
    layout = torch.channels_last if device.type == "cpu" else torch.contiguous_format
    return tokenizer.to(device, memory_format=layout)  # type: ignore[call-overload]


def encode_views(
    tokenizer: Tokenizer, views: np.ndarray, options: CodesOptions, num_labels: int | None = None
) -> np.ndarray:
    """Codes of uint8 views (n, H, W, C), int64 (n, L), computed on the tokenizer's device; with `num_labels`, views are ids with C = 1.

    Every call of the encoder has one shape, whatever n is: the last batch is filled with black, so that codes of an image
    depend on its place in the shard and on nothing that another attempt on such a machine would find otherwise. On a CPU each of
    torch's threads encodes its share of a batch, which keeps cores busier than sharing every operation does; their number, which
    `machine` records, decides the shape.
    """
    device = next(tokenizer.parameters()).device
    num_threads = min(torch.get_num_threads(), options.encode_batch_size) if device.type == "cpu" else 1
    size = -(-options.encode_batch_size // num_threads)
    encode = functools.partial(_encode_batch, tokenizer, size, options.encode_precision, num_labels)
    parts = [views[start : start + size] for start in range(0, len(views), size)]
    h, w = tokenizer.grid(views.shape[1])
    return np.concatenate([np.zeros((0, h * w), np.int64), *_map(encode, parts, num_threads)])


@torch.inference_mode()
def _encode_batch(tokenizer: Tokenizer, size: int, precision: str, num_labels: int | None, views: np.ndarray) -> np.ndarray:
    """Codes of at most `size` views, which are filled up to so many."""
    device = next(tokenizer.parameters()).device
    batch = np.zeros((size, *views.shape[1:]), np.uint8)
    batch[: len(views)] = views
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        encoded = tokenizer.encode(to_input(torch.from_numpy(batch).to(device), num_labels))
    return encoded[: len(views)].cpu().numpy()


def _map(function: Callable[[Any], Any], parts: Sequence[Any], num_threads: int) -> list[Any]:
    """`function` of every part, in order, by so many threads, each of which then computes alone."""
    if num_threads == 1:
        return [function(part) for part in parts]
    num_shared = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(num_threads, initializer=torch.set_num_threads, initargs=(1,)) as threads:
            return list(threads.map(function, parts))
    finally:
        torch.set_num_threads(num_shared)  # threads to come would begin with what those set for themselves


def numeric_mode(options: CodesOptions) -> dict[str, Any]:
    """What decides the codes besides tokenizer and pixels, as it enters the identity of a code dataset."""
    return {"precision": options.encode_precision, "tf32": False, "batch_size": options.encode_batch_size}


def machine(device: torch.device) -> dict[str, Any]:
    """What made the codes, for the record: near ties may fall otherwise on another machine."""
    is_cuda = device.type == "cuda"
    return {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if is_cuda else platform.processor() or platform.machine(),
        "cuda": torch.version.cuda if is_cuda else None,
        "cudnn": torch.backends.cudnn.version() if is_cuda else None,
        "num_threads": torch.get_num_threads(),
    }
