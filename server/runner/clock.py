"""The time at which devices have done what was asked of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import torch


def device_clock(devices: Iterable[torch.device]) -> Callable[[], float]:
    """A clock in seconds, as time.perf_counter, that waits for the CUDA devices among `devices`.

    A CUDA forward returns when it is enqueued: without the wait its time would be charged to
    whatever reads a result first, and the costs that strategies are chosen by would be wrong. A
    step waits once for its tokens anyway.
    """
    cuda = sorted({device for device in devices if device.type == "cuda"}, key=str)
    if not cuda:
        return time.perf_counter

    def clock() -> float:
        for device in cuda:
            torch.cuda.synchronize(device)
        return time.perf_counter()

    return clock
