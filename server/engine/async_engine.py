"""A thread around the engine, and streams that the event loop reads.

The engine thread owns the models and never waits for a client; the event loop never runs a
forward. Commands go in through a queue; deltas come back through `call_soon_threadsafe`, several
to a wake-up where a client reads slowly. A consumer is registered before its work is submitted,
and its work is aborted when it goes away.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence as Row
from functools import partial

from server.core.output import TokenDelta
from server.core.sequence import Sequence
from server.engine.engine import Engine
from server.errors import EngineDead, EngineDraining, EngineOverloaded, RequestTimeout

logger = logging.getLogger(__name__)

Command = Callable[[], None]


class _Stream:
    """One slot that the engine thread's deltas merge into, and a bell."""

    def __init__(self) -> None:
        self.deltas: list[TokenDelta] = []
        self.bell = asyncio.Event()
        self.error: BaseException | None = None

    def take(self) -> list[TokenDelta]:
        taken, self.deltas = self.deltas, []
        self.bell.clear()
        return taken


class AsyncEngine:
    """The engine as the HTTP layer sees it. All methods run on the event loop's thread."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._commands: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._streams: dict[str, _Stream] = {}
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._dead = asyncio.Event()
        self._draining = False
        self._stopping = False
        self.error: BaseException | None = None
        # Seconds of finished waits, and when the present one began: one value, so that a reader on
        # another thread never sees half of a change.
        self._idle: tuple[float, float | None] = (0.0, None)

    @property
    def _running_loop(self) -> asyncio.AbstractEventLoop:
        assert self._loop is not None
        return self._loop

    @property
    def num_models(self) -> int:
        return self._engine.num_models

    @property
    def max_length(self) -> int:
        return self._engine.max_length

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Tokens that end a text by themselves."""
        return self._engine.eos_token_ids

    @property
    def is_ready(self) -> bool:
        """Takes new work."""
        return self._thread is not None and not self._draining and self.error is None

    @property
    def is_draining(self) -> bool:
        return self._draining

    @property
    def num_open(self) -> int:
        """Sequences whose last delta has not been delivered."""
        return len(self._streams)

    @property
    def num_running(self) -> int:
        return len(self._engine.scheduler.running)

    @property
    def num_waiting(self) -> int:
        return max(0, self.num_open - self.num_running)

    @property
    def idle_seconds(self) -> float:
        """How long the engine thread has waited for work; it never falls."""
        seconds, since = self._idle
        return seconds if since is None else seconds + time.perf_counter() - since

    def start(self) -> None:
        """Start the engine thread; called once, inside the running loop."""
        assert self._thread is None
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def drain(self) -> None:
        """Refuse new work from now on; what runs goes on."""
        self._draining = True

    async def stop(self) -> None:
        """End the thread after its current step; open streams get EngineDraining."""
        self._draining = True
        self._stopping = True
        self._commands.put(None)
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)
        self._end_streams(EngineDraining("the server is shutting down"))

    async def wait_dead(self) -> None:
        """Return when the engine thread has failed; `error` says why."""
        await self._dead.wait()

    async def stream(
        self, sequences: Row[Sequence], seconds: float | None = None
    ) -> AsyncGenerator[list[TokenDelta]]:
        """Decode all sequences of a request.

        Args:
            sequences: none of them submitted yet.
            seconds: time they get, whether or not anybody reads.

        Yields:
            What has come since the last time, for any of them, until all have finished.

        Raises:
            EngineOverloaded: not all of them fit into the queue; nothing was submitted.
            EngineDraining: the server is starting or shutting down.
            EngineDead: the engine has failed.
            RequestTimeout: the time is over; what had come by then was yielded.
        """
        stream = self._open(sequences)
        unfinished = {sequence.id for sequence in sequences}
        timer = None
        if seconds is not None:
            timer = self._running_loop.call_later(seconds, self._expire, stream, seconds)
        try:
            while unfinished:
                await stream.bell.wait()
                deltas = stream.take()
                unfinished -= {d.sequence_id for d in deltas if d.finish_reason is not None}
                if deltas:
                    yield deltas
                if unfinished and stream.error is not None:
                    raise stream.error
        finally:
            if timer is not None:
                timer.cancel()
            self._close(unfinished)

    def _expire(self, stream: _Stream, seconds: float) -> None:
        """End what is unfinished of a stream, though its reader may be busy elsewhere."""
        stream.error = RequestTimeout(f"the request was not finished within {seconds:g} seconds")
        self._close([key for key, value in self._streams.items() if value is stream])
        stream.bell.set()

    def _open(self, sequences: Row[Sequence]) -> _Stream:
        if self.error is not None:
            raise EngineDead(f"the engine has failed: {self.error}")
        if not self.is_ready:
            raise EngineDraining("the server is not taking requests now")
        limits = self._engine.limits
        if self.num_open + len(sequences) > limits.max_sequences + limits.max_waiting:
            raise EngineOverloaded(
                f"{self.num_open} sequences are running or waiting and this request adds "
                f"{len(sequences)}; the limit is {limits.max_sequences} running and "
                f"{limits.max_waiting} waiting"
            )
        stream = _Stream()
        for sequence in sequences:
            self._streams[sequence.id] = stream
        for sequence in sequences:
            self._commands.put(partial(self._submit, sequence))
        return stream

    def _submit(self, sequence: Sequence) -> None:
        """On the engine thread: what cannot be queued ends alone."""
        try:
            self._engine.add(sequence)
        except Exception:
            logger.exception("sequence %s cannot be queued", sequence.id)
            delta = TokenDelta(
                sequence_id=sequence.id,
                finish_reason="error",
                stats=sequence.stats,
                error="an internal error in this request's path",
            )
            self._running_loop.call_soon_threadsafe(self._deliver, [delta])

    def _close(self, sequence_ids: Iterable[str]) -> None:
        """Abort what has not finished."""
        for sequence_id in sequence_ids:
            self._streams.pop(sequence_id, None)
            self._commands.put(partial(self._engine.abort, sequence_id))

    def _run(self) -> None:
        """The engine thread."""
        try:
            try:
                while self._obey():
                    for deltas in self._engine.stream_step():
                        self._hand_over(deltas)
            finally:
                self._hand_over(self._engine.hand_out())
        except BaseException as error:
            logger.exception("the engine has failed")
            self._running_loop.call_soon_threadsafe(self._die, error)

    def _hand_over(self, deltas: list[TokenDelta]) -> None:
        """To the event loop, from the engine thread."""
        if deltas:
            self._running_loop.call_soon_threadsafe(self._deliver, deltas)

    def _obey(self) -> bool:
        """Run queued commands, waiting for one if there is nothing to step; False to stop."""
        while not self._stopping:
            try:
                command = self._next_command()
            except queue.Empty:
                return True
            if command is not None:
                command()
        return False

    def _next_command(self) -> Command | None:
        """Raises queue.Empty where there is none and sequences are to be decoded."""
        if self._engine.has_work:
            return self._commands.get(block=False)
        started = time.perf_counter()
        self._idle = (self._idle[0], started)
        command = self._commands.get()
        self._idle = (self._idle[0] + time.perf_counter() - started, None)
        return command

    def _deliver(self, deltas: list[TokenDelta]) -> None:
        for delta in deltas:
            stream = self._streams.get(delta.sequence_id)
            if stream is None:
                continue  # its client has gone; the abort is on its way
            stream.deltas.append(delta)
            stream.bell.set()
            if delta.finish_reason is not None:
                del self._streams[delta.sequence_id]

    def _die(self, error: BaseException) -> None:
        self.error = error
        self._end_streams(EngineDead(f"the engine has failed: {error}"))
        self._dead.set()

    def _end_streams(self, error: BaseException) -> None:
        for stream in self._streams.values():
            stream.error = error
            stream.bell.set()
        self._streams.clear()
