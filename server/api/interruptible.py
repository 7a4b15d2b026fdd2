"""Work in a thread that another thread can end."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from threading import Lock, get_ident
from typing import TypeVar

T = TypeVar("T")


class Interrupted(BaseException):
    """Raised amid the work; no Exception, so that what the work catches lets it through."""


class Interruptible:
    """One piece of Python code, run in one thread and ended from another.

    The interpreter raises between two instructions of Python: a single call into C, such as one
    long replacement of text, comes to its end first.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._thread: int | None = None  # while there is something to interrupt
        self._is_over = False

    def run(self, work: Callable[[], T]) -> T:
        """`work()`; called once.

        Raises:
            Interrupted: `interrupt` was called before it had come to an end.
        """
        with self._lock:
            if self._is_over:
                raise Interrupted
            self._thread = get_ident()
        try:
            return work()
        finally:
            if self._end():
                _swallow()

    def _end(self) -> bool:
        """From here on nothing is raised in this thread; whether something has been."""
        with self._lock:
            was_interrupted, self._is_over, self._thread = self._is_over, True, None
        return was_interrupted

    def interrupt(self) -> None:
        """End the work; from any other thread, at any time, as often as wanted."""
        with self._lock:
            self._is_over = True
            # Once at most: the thread may go on to something else as soon as it is hit.
            thread, self._thread = self._thread, None
            if thread is not None:
                _interrupt(thread)


def _interrupt(thread: int) -> None:
    """Have the interpreter raise Interrupted in a thread, once even if it was to already."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(
        ctypes.c_ulong(thread), ctypes.py_object(Interrupted)
    )


def _swallow() -> None:
    """Let what was raised in this thread arrive here, not in what it does next.

    Taking it back by the interpreter's own means would, before Python 3.13, leave every thread on
    the slow path that looks for such exceptions.
    """
    try:
        _interrupt(get_ident())
        while True:
            pass
    except Interrupted:
        pass
