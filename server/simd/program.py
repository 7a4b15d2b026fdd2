"""Kernels that the same threads run one after the other, called once for all of them.

Calling a kernel from Python takes longer than many kernels run. What a program's kernels work on is
therefore written down once; only numbers that differ from run to run are exchanged.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from server.simd.compiled import compiled
from server.simd.kernel import Kernel
from server.simd.support import barrier
from server.simd.vectors import I64, WHOLE, load_whole, pointer

# A step is three int64 numbers: the function's address, that of its arguments, and whether all
# threads wait for each other behind it.
_STEP = 3 * WHOLE
_ARGUMENTS, _WAITS = WHOLE, 2 * WHOLE


@dataclass(frozen=True, slots=True)
class Later:
    """A whole number, often an address, that is known when the program runs; plus `offset`."""

    name: str
    offset: int = 0


class Program:
    """Some kernels in their order. One thread at a time may run it."""

    def __init__(self) -> None:
        self._steps: list[tuple[int, int, bool]] = []  # arguments by their number
        self._numbers: list[int] = []
        self._places: dict[str, list[int]] = {}
        self._offsets: dict[str, list[int]] = {}
        self._kernels: list[Kernel] = []  # compiled code is good for as long as these live
        self._ready: _Ready | None = None

    def add(self, kernel: Kernel, *, waits: bool = True, **arguments: float | Later) -> None:
        """`kernel` with `arguments`, behind all that were added before.

        Args:
            kernel: see Kernel.
            waits: all threads finish it before any goes on. Without, a thread goes on alone, and
                may read only what itself has written since they last waited.
            arguments: by name, all that it takes.
        """
        assert arguments.keys() == kernel.arguments.keys(), "a kernel takes what it names"
        self._steps.append((kernel.address, len(self._numbers), waits))
        self._kernels.append(kernel)
        for name, kind in kernel.arguments.items():
            value = arguments[name]
            if isinstance(value, Later):
                assert kind == "q", "only whole numbers come later"
                self._places.setdefault(value.name, []).append(len(self._numbers))
                self._offsets.setdefault(value.name, []).append(value.offset)
                value = 0
            number = np.float64(value).view(np.int64) if kind == "d" else value
            self._numbers.append(int(number))
        self._ready = None

    def run(self, **numbers: int) -> None:
        """Run all on as many threads as torch would use, and return when they have finished.

        `numbers` are all that come later, and may be more.
        """
        if self._ready is None:
            self._ready = _Ready(self._numbers, self._steps, dict(self._columns()))
        self._ready.run(numbers)

    def _columns(self) -> Iterator[tuple[str, tuple[Any, Any]]]:
        for name, places in self._places.items():
            yield name, (np.array(places), np.array(self._offsets[name]))


class _Ready:
    """A program in memory."""

    def __init__(
        self,
        numbers: list[int],
        steps: list[tuple[int, int, bool]],
        columns: dict[str, tuple[Any, Any]],
    ) -> None:
        self._numbers = np.array(numbers, np.int64)
        first = self._numbers.ctypes.data
        self._steps = np.array(
            [(address, first + place * WHOLE, waits) for address, place, waits in steps], np.int64
        )
        self._arguments = self._steps.ctypes.data, len(steps)
        self._columns = columns
        self._known: dict[str, int] = {}

    def run(self, numbers: dict[str, int]) -> None:
        for name, (places, offsets) in self._columns.items():
            number = numbers[name]
            if self._known.get(name) != number:
                self._numbers[places] = offsets + number
                self._known[name] = number
        _runner()(*self._arguments)


@intrinsic
def _call(context: Any, function: Any, argument: Any) -> Any:
    """The C function at an address, of one address."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [I64])
        builder.call(pointer(builder, args[0], kind), [args[1]])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@cache
def _runner() -> Kernel:
    wait = barrier()

    @compiled
    def body(a: Any, thread: Any, num_threads: Any) -> None:
        for number in range(a.num_steps):
            step = a.steps + number * _STEP
            _call(load_whole(step), load_whole(step + _ARGUMENTS))
            if load_whole(step + _WAITS):
                wait()

    return Kernel(body, {"steps": "q", "num_steps": "q"})
