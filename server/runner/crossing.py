"""Copies between the device where scores meet and another, beside what both are asked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Crossing:
    """A stream of the meeting device for one model that is on another GPU.

    torch copies between GPUs after all that the streams of both were given, and lets both go on
    afterwards. In a stream of its own a copy waits for what was decided so far and for the other
    GPU, and nothing waits for it before it is asked to.
    """

    def __init__(self, meeting: torch.device) -> None:
        self._meeting = meeting
        self._stream = torch.cuda.Stream(meeting)

    @contextmanager
    def begun(self) -> Iterator[None]:
        """What the meeting device is given in here it does in this stream."""
        self._stream.wait_stream(torch.cuda.current_stream(self._meeting))
        with torch.cuda.stream(self._stream):
            yield

    def mark(self) -> torch.cuda.Event:
        """After all that this stream was given."""
        event = torch.cuda.Event()
        event.record(self._stream)
        return event

    def join(self, mark: torch.cuda.Event) -> None:
        """Let what is decided from now on come after `mark`."""
        torch.cuda.current_stream(self._meeting).wait_event(mark)
