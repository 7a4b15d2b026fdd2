"""Time on a device that runs behind the host, and what it could do at best."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch

_WARM_UPS = 3


def synchronize(device: torch.device) -> None:
    """Wait until `device` has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median_seconds(work: Callable[[], object], device: torch.device, rounds: int = 15) -> float:
    """Wall time of `work` from its call until the device is done."""
    for _ in range(_WARM_UPS):
        work()
    times = []
    for _ in range(rounds):
        synchronize(device)
        started = time.perf_counter()
        work()
        synchronize(device)
        times.append(time.perf_counter() - started)
    return median(times)


def measure_bandwidth(device: torch.device, size: int) -> float:
    """Bytes a second, read and written, of a copy of `size` bytes."""
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / median_seconds(lambda: target.copy_(source), device)


def measure_products(device: torch.device, dtype: torch.dtype, side: int) -> float:
    """Operations a second of a product of two square matrices of random numbers."""
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return 2 * side**3 / median_seconds(lambda: a @ b, device)
