"""Time on a device that runs behind the host, and what it could do at best."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch

_WARM_UPS = 3
# Of what takes a GPU less time than the host takes to launch it.
_LAUNCHES = 20
# Clock cycles that a GPU is kept waiting meanwhile, some ten milliseconds.
_HEAD_START = 20_000_000


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


def median_launch_seconds(
    work: Callable[[], object], device: torch.device, rounds: int = 15
) -> float:
    """Time on the device of one `work` of several, all of which are enqueued when it begins.

    What they read may come from its cache: all of them read the same.
    """
    if device.type != "cuda":
        return median_seconds(work, device, rounds)
    for _ in range(_WARM_UPS):
        work()
    start, end = (
        torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        for _ in range(2)
    )
    times: list[float] = []
    for _ in range(rounds):
        synchronize(device)
        torch.cuda._sleep(_HEAD_START)  # type: ignore[no-untyped-call]
        start.record()
        for _ in range(_LAUNCHES):
            work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / _LAUNCHES)
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
