"""Threads that grammars are read in."""

from __future__ import annotations

import threading
from asyncio import wrap_future
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import TypeVar

T = TypeVar("T")

READER = "grammar-reader"  # name of a thread while it reads
_NUM_THREADS = 2
# Of stack, for a byte of a grammar. The library that reads them follows references by recursion:
# the longest chain of schemas takes less than half of this.
_STACK_PER_BYTE = 2048


class GrammarThreads:
    """A few threads with stacks for the longest grammar; a usual one would end the process.

    A thread cannot be ended from outside: what nobody waits for any more keeps its thread, and
    others wait for it.
    """

    def __init__(self, max_grammar_bytes: int) -> None:
        self._stack_bytes = max(1 << 20, _STACK_PER_BYTE * max_grammar_bytes)

    async def run(self, work: Callable[[], T]) -> T:
        """`work()`, as soon as a thread is free; on the event loop."""
        return await wrap_future(self._executor.submit(_named, work))

    @cached_property
    def _executor(self) -> ThreadPoolExecutor:
        executor = ThreadPoolExecutor(_NUM_THREADS, "grammar")
        all_run = threading.Barrier(_NUM_THREADS + 1)
        usual = threading.stack_size(self._stack_bytes)
        try:
            # A thread is made where none is idle: none is before all of them are there.
            for _ in range(_NUM_THREADS):
                executor.submit(all_run.wait)
            all_run.wait()
        except BaseException:  # there is no memory for one of them: the others wait no longer
            all_run.abort()
            raise
        finally:
            threading.stack_size(usual)
        return executor


def _named(work: Callable[[], T]) -> T:
    thread = threading.current_thread()
    usual, thread.name = thread.name, READER
    try:
        return work()
    finally:
        thread.name = usual
