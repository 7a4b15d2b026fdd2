"""Work that waits for one of a few threads, and has its time from when it begins."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from anyio import fail_after

from server.errors import ThreadsBusy

T = TypeVar("T")


async def in_time(
    run: Callable[[Callable[[], T]], Awaitable[T]], work: Callable[[], T], seconds: float, what: str
) -> T:
    """`work()`, as `run` runs it in a thread.

    Args:
        run: runs what it is given as soon as a thread is free.
        work: takes its time in a thread.
        seconds: that it may wait for a thread, and again that it may take.
        what: the threads do, for errors.

    Raises:
        TimeoutError: it took longer.
        ThreadsBusy: no thread was free so long.
    """
    loop = asyncio.get_running_loop()
    has_begun = False

    def begin() -> None:
        nonlocal has_begun
        has_begun = True
        scope.deadline = loop.time() + seconds

    def begun() -> T:
        loop.call_soon_threadsafe(begin)
        return work()

    try:
        with fail_after(seconds) as scope:
            return await run(begun)
    except TimeoutError as error:
        if has_begun:
            raise
        raise ThreadsBusy(
            f"all threads for {what} were busy for {seconds:g} s; try again later"
        ) from error
