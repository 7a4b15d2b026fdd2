"""Streams, events and graphs: what is enqueued, and when it is done.

When it would be done, too: had a GPU as much to do for each operation, and a host nothing but to
wait.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

Work = Callable[[], object]
_SECONDS = 1e-6


def spoil(memory: Tensor) -> None:
    """Fill with what must not be read."""
    if memory.dtype.is_floating_point:
        memory.fill_(float("nan"))
    elif memory.dtype == torch.bool:
        memory.fill_(True)
    else:
        memory.fill_(torch.iinfo(memory.dtype).max // 2)


@dataclass(eq=False)
class Host:
    """What enqueues and waits; `seconds` at which it last had to."""

    seconds: float = 0.0


@dataclass(eq=False)
class Stream:
    """In order, and not before somebody waits.

    Attributes:
        index: of its device.
        host: that asks it.
        capturing: the graph that takes what it is asked.
        seconds: at which what it has done was done.
        busy: when it had something to do, as (from, to).
    """

    index: int
    host: Host
    capturing: Graph | None = None
    seconds: float = 0.0
    busy: list[tuple[float, float]] = field(default_factory=list)
    _works: deque[tuple[Work, float, float]] = field(default_factory=deque)

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", self.index)

    def enqueue(self, work: Work, seconds: float = _SECONDS) -> None:
        """Or let the graph that is being captured do it whenever it is replayed."""
        if self.capturing is None:
            self._works.append((work, seconds, self.host.seconds))
        else:
            self.capturing.works.append((work, seconds))

    def wait_event(self, event: Event) -> None:
        """What is enqueued from now on comes after `event`."""
        mark = event.mark
        assert mark is not None, "an event is waited for that was never recorded"
        self.enqueue(partial(self._follow, mark), 0.0)

    def _follow(self, mark: Mark) -> None:
        mark.reach()
        self.seconds = max(self.seconds, mark.seconds)

    def wait_stream(self, other: Stream) -> None:
        """What is enqueued from now on comes after what `other` was given."""
        event = Event()
        event.record(other)
        self.wait_event(event)

    def synchronize(self) -> None:
        """Do everything, and let the host wait for it."""
        self.run()
        self.host.seconds = max(self.host.seconds, self.seconds)

    def run(self, until: Mark | None = None) -> None:
        """Do what was enqueued before `until`, or everything."""
        with _disable_current_modes(), torch.inference_mode():
            while self._works and not (until and until.is_reached):
                work, seconds, asked = self._works.popleft()
                self.seconds = max(self.seconds, asked)
                work()
                if seconds:
                    self._pass(seconds)

    def _pass(self, seconds: float) -> None:
        begun = self.seconds
        self.seconds += seconds
        if self.busy and self.busy[-1][1] == begun:
            begun, _ = self.busy.pop()
        self.busy.append((begun, self.seconds))


@dataclass(eq=False)
class Mark:
    """A place in a stream."""

    stream: Stream
    is_reached: bool = False
    seconds: float = 0.0

    def reach(self) -> None:
        """Do what stands before it."""
        self.stream.run(self)

    def pass_by(self) -> None:
        """The stream has come to it."""
        self.is_reached, self.seconds = True, self.stream.seconds


class Event:
    """torch.cuda.Event."""

    def __init__(self, enable_timing: bool = False) -> None:
        self._enable_timing = enable_timing
        self.mark: Mark | None = None

    def record(self, stream: Stream) -> None:
        """After all that `stream` was given so far."""
        self.mark = Mark(stream)
        stream.enqueue(self.mark.pass_by, 0.0)

    def query(self) -> bool:
        """Has it come to pass?"""
        return self.mark is None or self.mark.is_reached

    def synchronize(self) -> None:
        """Let the host wait for it."""
        if self.mark is not None:
            self.mark.reach()
            host = self.mark.stream.host
            host.seconds = max(host.seconds, self.mark.seconds)

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds."""
        return 1000 * (end._passed_at() - self._passed_at())

    def _passed_at(self) -> float:
        assert self._enable_timing, "it was made without enable_timing"
        assert self.mark is not None
        assert self.mark.is_reached, "nobody has waited for it"
        return self.mark.seconds


class Allocation:
    """Memory that the stream it was made in uses anew once no tensor lies there any more.

    After what other streams did with it, where these are recorded; else beside that.
    """

    def __init__(self, memory: Tensor, stream: Stream) -> None:
        self._memory = memory
        self._stream = stream
        self._is_captured = stream.capturing is not None  # and is kept for replays
        self._used_in: set[Stream] = set()

    def record(self, stream: Stream) -> None:
        """Tensor.record_stream."""
        self._used_in.add(stream)

    def __del__(self) -> None:
        if self._is_captured or self._stream.capturing is not None:
            return
        for stream in self._used_in:
            self._stream.wait_stream(stream)
        self._stream.enqueue(partial(spoil, self._memory), 0.0)


@dataclass(eq=False)
class Graph:
    """Work to be repeated on the same memory; graphs of one pool share theirs.

    Attributes:
        works, results: what is done, and where its results lie.
        pool: all of its pool.
        device: on which it was captured, and is replayed.
    """

    works: list[tuple[Work, float]] = field(default_factory=list)
    results: list[Tensor] = field(default_factory=list)
    pool: list[Graph] = field(default_factory=list)
    device: torch.device | None = None

    def replay_in(self, stream: Stream) -> None:
        """Enqueue it; what graphs of its pool have left behind is lost."""
        assert self.works, "a graph is replayed that nothing was captured for"
        for memory in [memory for graph in self.pool for memory in graph.results]:
            stream.enqueue(partial(spoil, memory), 0.0)
        for work, seconds in self.works:
            stream.enqueue(work, seconds)


@contextmanager
def captured_in(graph: Graph, stream: Stream) -> Iterator[None]:
    """What `stream` is given is not done but kept."""
    stream.synchronize()
    stream.capturing = graph
    try:
        yield
    finally:
        stream.capturing = None
