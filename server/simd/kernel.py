"""Running compiled code on torch's threads, its arguments given as plain numbers."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numba import carray, cfunc, from_dtype, types

from server.simd.compiled import compiled
from server.simd.support import openmp, team_function

Body = Callable[[Any, Any, Any], None]


class Kernel:
    """A compiled function, run once on each thread of a team.

    The arguments of one call are packed into bytes that nobody changes, so that any number of
    threads may call a kernel at once.

    Attributes:
        arguments: names and kinds, as they were given.
        address: of a C function of the address of packed arguments, which does the calling
            thread's part.
    """

    def __init__(self, body: Body, arguments: dict[str, str]) -> None:
        """Compile `body`, which takes the arguments, its thread's number and how many there are.

        Args:
            body: `compiled`; reads an argument as `arguments.name`.
            arguments: names in order, with `q` for whole numbers and addresses, `d` for others.
        """
        self.arguments = arguments
        kinds = {"q": np.int64, "d": np.float64}
        layout = from_dtype(np.dtype([(name, kinds[kind]) for name, kind in arguments.items()]))
        thread, threads = _asking("omp_get_thread_num"), _asking("omp_get_num_threads")

        @cfunc(types.void(types.CPointer(layout)))
        def member(pointer: Any) -> None:
            body(carray(pointer, 1)[0], thread(), threads())

        self._pack = struct.Struct("".join(arguments.values())).pack
        self._function = member  # its address is good for as long as this lives
        self.address: int = member.address
        self._alone = ctypes.CFUNCTYPE(None, ctypes.c_char_p)(member.address)
        self._team = team_function()

    def in_order(self, **arguments: float) -> list[float]:
        """Arguments by name, all that it takes, as a call has them."""
        assert arguments.keys() == self.arguments.keys(), "a kernel takes what it names"
        return [arguments[name] for name in self.arguments]

    def __call__(self, *arguments: float) -> None:
        """Run on as many threads as torch would use, and return when all have finished."""
        self._team(self.address, self._pack(*arguments), torch.get_num_threads(), 0)

    def alone(self, *arguments: float) -> None:
        """Run on this thread: for so little work that waking others takes longer."""
        self._alone(self._pack(*arguments))


def _asking(name: str) -> Any:
    """A function of the OpenMP library without arguments, for compiled code to call."""
    function = getattr(openmp(), name)
    function.argtypes, function.restype = [], ctypes.c_int
    return function


@compiled
def part(count: Any, thread: Any, num_threads: Any) -> Any:
    """A thread's part of `count`: from the first to before the second."""
    return count * thread // num_threads, count * (thread + 1) // num_threads
