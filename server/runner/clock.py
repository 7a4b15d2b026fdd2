"""The time at which devices have done what was asked of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Protocol

import torch


def device_clock(devices: Iterable[torch.device]) -> Callable[[], float]:
    """A clock in seconds, as time.perf_counter, that waits for the CUDA devices among `devices`.

    A CUDA forward returns when it is enqueued: without the wait a step would seem to end before
    its work has. Within a step a `Stopwatch` does not wait.
    """
    cuda = sorted({device for device in devices if device.type == "cuda"}, key=str)
    if not cuda:
        return time.perf_counter

    def clock() -> float:
        for device in cuda:
            torch.cuda.synchronize(device)
        return time.perf_counter()

    return clock


class Stopwatch(Protocol):
    """Seconds that a device takes for what it is asked between `start` and `stop`."""

    def start(self) -> None: ...

    def stop(self) -> None: ...

    def seconds(self) -> float:
        """Between the last start and the last stop; waits until the device has come to the stop."""
        ...


def make_stopwatch(device: torch.device, clock: Callable[[], float]) -> Stopwatch:
    """Of a CUDA device by events in its stream, else by `clock`."""
    return CudaStopwatch(device) if device.type == "cuda" else HostStopwatch(clock)


class HostStopwatch:
    """For devices that have done what they were asked when the call returns."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._started = self._stopped = 0.0

    def start(self) -> None:
        self._started = self._clock()

    def stop(self) -> None:
        self._stopped = self._clock()

    def seconds(self) -> float:
        """See Stopwatch.seconds."""
        return self._stopped - self._started


class CudaStopwatch:
    """For work that is only enqueued: starting and stopping enqueue, too, and wait for nothing."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._start = torch.cuda.Event(enable_timing=True)
        self._stop = torch.cuda.Event(enable_timing=True)

    def start(self) -> None:
        self._start.record(torch.cuda.current_stream(self._device))

    def stop(self) -> None:
        self._stop.record(torch.cuda.current_stream(self._device))

    def seconds(self) -> float:
        """See Stopwatch.seconds."""
        self._stop.synchronize()
        milliseconds: float = self._start.elapsed_time(self._stop)
        return milliseconds / 1000
