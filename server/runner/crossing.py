"""Copies between the device where scores meet and another, beside what both are asked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class Crossing:
    """A stream on the meeting device and one on another GPU, for a model that is there.

    torch copies between GPUs in the source's stream, after all that the streams of both were given,
    and lets both go on afterwards; and in a device's first stream CUDA may keep everything on both
    devices waiting. In streams of its own a copy waits for what it copies and for what was decided
    so far, and nothing waits for it before it is asked to.
    """

    def __init__(self, meeting: torch.device, remote: torch.device) -> None:
        self._meeting = meeting
        self._remote = remote
        self._near = torch.cuda.Stream(meeting)
        self._far = torch.cuda.Stream(remote)

    @contextmanager
    def going(self) -> Iterator[None]:
        """What the meeting device is given in here it does in the stream there."""
        self._near.wait_stream(torch.cuda.current_stream(self._meeting))
        with torch.cuda.stream(self._near):
            yield

    @contextmanager
    def coming(self, tensor: Tensor) -> Iterator[None]:
        """What is done with `tensor` of the other GPU in here is done in both streams."""
        self._far.wait_stream(torch.cuda.current_stream(self._remote))
        # Else its memory is given to what that GPU is asked next, once nobody here keeps it.
        tensor.record_stream(self._far)
        with torch.cuda.stream(self._far), self.going():
            yield

    def mark(self) -> torch.cuda.Event:
        """After all that has come."""
        event = torch.cuda.Event()
        event.record(self._near)
        return event

    def join(self, mark: torch.cuda.Event) -> None:
        """Let what is decided from now on come after `mark`."""
        torch.cuda.current_stream(self._meeting).wait_event(mark)
