"""What a device took, told without waiting for it while there is more to enqueue."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

Mark = float | torch.cuda.Event


class Timeline(Protocol):
    """Marks between what a device is asked, and the seconds between marks."""

    def mark(self) -> Mark:
        """After all that the device was asked so far; does not wait."""
        ...

    def follow(self, mark: Mark) -> None:
        """Let the device begin what it is asked from now on after `mark` on another one."""
        ...

    def seconds(self, start: Mark, stop: Mark) -> float:
        """From one mark to another; waits until the device has come to the latter."""
        ...


def make_timeline(device: torch.device, clock: Callable[[], float]) -> Timeline:
    """Of a CUDA device by events in its stream, else by `clock`, in seconds."""
    return CudaTimeline(device) if device.type == "cuda" else HostTimeline(clock)


class HostTimeline:
    """For devices that have done what they were asked when the call returns."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock

    def mark(self) -> Mark:
        """See Timeline.mark."""
        return self._clock()

    def follow(self, mark: Mark) -> None:
        """See Timeline.follow; a CPU waits where it reads what another device has made."""

    def seconds(self, start: Mark, stop: Mark) -> float:
        """See Timeline.seconds."""
        assert isinstance(start, float)
        assert isinstance(stop, float)
        return stop - start


class CudaTimeline:
    """For work that is only enqueued: so are the marks."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def mark(self) -> Mark:
        """See Timeline.mark."""
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def follow(self, mark: Mark) -> None:
        """See Timeline.follow; what a CPU was asked is done already."""
        if not isinstance(mark, float):
            torch.cuda.current_stream(self._device).wait_event(mark)

    def seconds(self, start: Mark, stop: Mark) -> float:
        """See Timeline.seconds."""
        assert not isinstance(start, float)
        assert not isinstance(stop, float)
        stop.synchronize()
        milliseconds: float = start.elapsed_time(stop)
        return milliseconds / 1000
