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
            with self._lock:
                self._thread, self._is_over = None, True
            # What was raised but has not arrived must not hit whatever this thread does next.
            _raise_in(get_ident(), None)

    def interrupt(self) -> None:
        """End the work; from any other thread, at any time, as often as wanted."""
        with self._lock:
            self._is_over = True
            if self._thread is not None:
                _raise_in(self._thread, Interrupted)


def _raise_in(thread: int, error: type[BaseException] | None) -> None:
    """Have the interpreter raise `error` in a thread; None takes back one that has not arrived."""
    kind = ctypes.py_object() if error is None else ctypes.py_object(error)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), kind)
