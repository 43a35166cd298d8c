"""The speed limit that a step is held against: peak FLOP/s of the devices.

GPUs by name, dense bf16 tensor-core figures of the vendor's data sheets. A CPU's is measured, as the rate of a large matrix
product, because its clock under vector load is nobody's promise.
"""

from __future__ import annotations

import time

import torch

__all__ = ["peak_flops"]

# Dense bf16, without sparsity: NVIDIA data sheets of A100, H100 SXM and PCIe, H200, B200.
_GPU_BF16 = {
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
}


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOP/s of one rank's device for matrix products in ``dtype``; None for a GPU that is not in the table.

    On CPU this takes about a quarter of a second with the rank's own number of threads.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return next((rate for key, rate in _GPU_BF16.items() if key in name), None)
    size = 1024
    a = torch.randn(size, size, dtype=torch.float32).to(dtype)
    b = torch.randn(size, size, dtype=torch.float32).to(dtype)
    torch.mm(a, b)
    best = 0.0
    stop = time.perf_counter() + 0.2
    while time.perf_counter() < stop:
        start = time.perf_counter()
        torch.mm(a, b)
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best
