"""Threads with large stacks, for what is read by recursion."""

from __future__ import annotations

import asyncio
import threading

import pytest

from server.api.grammar_threads import READER, GrammarThreads
from tests.support.live_server import wait_until

MEGABYTE = 1 << 20


def readers() -> int:
    return sum(thread.name == READER for thread in threading.enumerate())


def test_two_read_at_a_time_under_a_name() -> None:
    threads, gate = GrammarThreads(1), threading.Event()
    running: list[int] = []

    def work() -> int:
        running.append(readers())
        gate.wait(20)
        return threading.get_ident()

    async def run() -> list[int]:
        tasks = [asyncio.create_task(threads.run(work)) for _ in range(5)]
        await asyncio.to_thread(wait_until, lambda: readers() == 2)
        gate.set()
        return await asyncio.gather(*tasks)

    assert len(set(asyncio.run(run()))) == 2
    assert set(running) <= {1, 2}
    wait_until(lambda: readers() == 0)


def test_what_nobody_waits_for_keeps_its_thread() -> None:
    threads, gate = GrammarThreads(1), threading.Event()

    async def run() -> None:
        for _ in range(3):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.05):
                    await threads.run(lambda: gate.wait(20))
        assert readers() == 2
        gate.set()
        assert await threads.run(lambda: "read") == "read"

    asyncio.run(run())


def test_errors_are_the_readers() -> None:
    def fail() -> None:
        raise ValueError("no grammar")

    with pytest.raises(ValueError, match="no grammar"):
        asyncio.run(GrammarThreads(1).run(fail))


def test_stacks_follow_the_longest_grammar(monkeypatch: pytest.MonkeyPatch) -> None:
    """And threads that are made later have usual ones."""
    asked, usual = [], threading.stack_size()
    set_size = threading.stack_size

    def note(size: int = 0) -> int:
        asked.append(size)
        return set_size(size)

    monkeypatch.setattr(threading, "stack_size", note)
    for num_bytes in (1, 64 << 10):
        assert asyncio.run(GrammarThreads(num_bytes).run(lambda: 7)) == 7
    assert asked == [MEGABYTE, usual, 128 * MEGABYTE, usual]
