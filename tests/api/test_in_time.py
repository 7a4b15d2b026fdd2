"""One's own time is told from the time of those before."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import pytest

from server.api.in_time import in_time
from server.errors import ThreadsBusy

T = TypeVar("T")


def run_behind(others: threading.Event, work: Callable[[], T], seconds: float) -> T:
    """`work` in the only thread there is, once `others` have left it."""

    async def run() -> T:
        with ThreadPoolExecutor(1) as executor:
            executor.submit(others.wait, 20)
            loop = asyncio.get_running_loop()
            try:
                return await in_time(
                    lambda begun: loop.run_in_executor(executor, begun), work, seconds, "work"
                )
            finally:
                others.set()

    return asyncio.run(run())


def test_what_never_began_is_not_too_slow() -> None:
    with pytest.raises(ThreadsBusy, match="all threads for work were busy"):
        run_behind(threading.Event(), lambda: 1, 0.05)


def test_what_began_may_take_its_own_time() -> None:
    """Which begins when the others have gone."""
    others = threading.Event()
    threading.Timer(0.2, others.set).start()
    assert run_behind(others, lambda: threading.Event().wait(0.2), 0.3) is False


def test_what_takes_longer_is_too_slow() -> None:
    others = threading.Event()
    others.set()
    with pytest.raises(TimeoutError):
        run_behind(others, lambda: threading.Event().wait(0.2), 0.05)
