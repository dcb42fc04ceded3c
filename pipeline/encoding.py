"""The frozen tokenizer at work: uint8 views to codes, in a declared numeric mode and batches of one shape."""

import platform
from typing import Any

import numpy as np
import torch

from stages.first_stage.pixels import to_input
from stages.first_stage.tokenizer import Tokenizer
from stages.options import CodesOptions


def use_parity_mode() -> None:
    """Makes float32 mean float32: no TF32, no cuDNN algorithm that is chosen by timing or sums in a varying order."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True


def prepare_encoder(tokenizer: Tokenizer, device: torch.device) -> Tokenizer:
    """The tokenizer in the memory layout that convolutions are fastest in: on CPUs channels last, which costs a GPU a seventh.

    Codes are those of the other layout, but for near ties.
    """
    use_parity_mode()
    layout = torch.channels_last if device.type == "cpu" else torch.contiguous_format
    return tokenizer.to(device, memory_format=layout)  # type: ignore[call-overload]


@torch.inference_mode()
def encode_views(
    tokenizer: Tokenizer, views: np.ndarray, options: CodesOptions, num_labels: int | None = None
) -> np.ndarray:
    """Codes of uint8 views (n, H, W, C), int64 (n, L), computed on the tokenizer's device; with `num_labels`, views are ids with C = 1.

    Every call of the encoder has one shape, whatever n is: the last batch is filled with black, so that codes of an image
    depend on its place in the shard and on nothing an attempt could change.
    """
    device = next(tokenizer.parameters()).device
    size = options.encode_batch_size
    h, w = tokenizer.grid(views.shape[1])
    codes = [np.zeros((0, h * w), np.int64)]
    for start in range(0, len(views), size):
        part = views[start : start + size]
        batch = np.zeros((size, *views.shape[1:]), np.uint8)
        batch[: len(part)] = part
        with torch.autocast(device.type, torch.bfloat16, enabled=options.encode_precision == "bf16"):
            encoded = tokenizer.encode(to_input(torch.from_numpy(batch).to(device), num_labels))
        codes.append(encoded[: len(part)].cpu().numpy())
    return np.concatenate(codes)


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
