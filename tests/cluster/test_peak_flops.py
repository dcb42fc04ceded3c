"""What MFU is measured against."""

import pytest
import torch

from cluster.peak_flops import gpu_peak_flops, measured_peak_flops


@pytest.mark.parametrize(
    "name, peak",
    [
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA L40S", 362.05e12),
        ("NVIDIA H1000", None),
        ("Tesla K80", None),
    ],
)
def test_gpus_are_known_by_name(name, peak):
    assert gpu_peak_flops(name) == peak


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cpu_is_measured_and_left_as_it_was(dtype):
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    assert measured_peak_flops(dtype, threads + 1) > 1e6
    assert torch.get_num_threads() == threads and torch.equal(torch.get_rng_state(), state)
