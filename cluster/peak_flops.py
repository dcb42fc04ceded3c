"""The most floating-point operations per second that a device can do, which MFU is measured against."""

import time

import torch

from cluster.estimates import GPUS
from stages.second_stage.operations import linear

# Dense bf16 matrix products, by how the name of a CUDA device begins (NVIDIA's data sheets). The longest that fits counts.
GPU_PEAK_FLOPS = {f"NVIDIA {name}": gpu.peak_flop for name, gpu in GPUS.items()} | {
    "NVIDIA A10": 125e12,
    "NVIDIA A10G": 70e12,
    "NVIDIA A30": 165e12,
    "NVIDIA A40": 149.7e12,
    "NVIDIA GH200": 989.4e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40": 181e12,
    "NVIDIA GeForce RTX 3090": 71e12,
    "NVIDIA GeForce RTX 4090": 165.2e12,
}
MATRIX_SIZE = 1024
MEASURE_SECONDS = 0.2


def gpu_peak_flops(name: str) -> float | None:
    """Peak bf16 FLOP/s of the GPU with this name (`torch.cuda.get_device_name`); None for one that the table lacks."""
    known = [key for key in GPU_PEAK_FLOPS if name == key or name.startswith((key + " ", key + "-"))]
    return GPU_PEAK_FLOPS[max(known, key=len)] if known else None


@torch.no_grad()
def measured_peak_flops(dtype: torch.dtype, num_threads: int) -> float:
    """FLOP/s of the fastest of the square matrix products that a linear layer does on this CPU in 0.2 s.

    Ranks that share a machine must measure at the same time, as they will compute at the same time.

    Args:
        dtype: of the factors.
        num_threads: torch threads of this process.
    """
    factor = torch.ones(MATRIX_SIZE, MATRIX_SIZE, dtype=dtype)
    threads_before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        linear(factor, factor)  # the first product also prepares the kernel
        fastest, end = float("inf"), time.perf_counter() + MEASURE_SECONDS
        while (start := time.perf_counter()) < end:
            linear(factor, factor)
            fastest = min(fastest, time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads_before)
    return 2 * MATRIX_SIZE**3 / fastest
