"""What layers do between their products, in one pass each, compiled by Numba for the CPU.

Small as they are, a torch operation each takes longer to call than to compute for few tokens: they
were a third of a small model's forward.
"""

from __future__ import annotations

from functools import cache
from math import sqrt
from typing import Any

import numpy as np
import torch
from torch import Tensor

from server.runner.operations import Heads, Norm, Rotation, TorchOperations
from server.simd import vectors
from server.simd.compiled import compiled
from server.simd.functions import exp
from server.simd.kernel import Kernel, part
from server.simd.program import Later, Program
from server.simd.support import BITS
from server.simd.vectors import LANES

_ZERO, _ONE = np.float32(0.0), np.float32(1.0)
# Numbers from which an operation is shared between threads: waking them takes a microsecond.
_SHARED_NUMBERS = 16384


class SimdOperations:
    """Operations of float32 states on the CPU; of sizes that no vector fits, torch's."""

    def __init__(self, taken: torch.dtype) -> None:
        """`taken` is what products take: float32 or bfloat16."""
        self._torch = TorchOperations()
        self._taken = taken

    def norm(self, weight: Tensor, eps: float) -> Norm:
        """See Operations.norm."""
        if len(weight) % LANES:
            return self._torch.norm(weight, eps)
        return SimdNorm(weight, eps, self._taken)

    def rotation(self, heads: Heads) -> Rotation:
        """See Operations.rotation."""
        return SimdRotation(heads)

    def gate(self, x: Tensor) -> Tensor:
        """See Operations.gate."""
        size = x.shape[1] // 2
        if size % LANES:
            return self._torch.gate(x)
        x = x.contiguous()
        output = x.new_empty(len(x), size, dtype=self._taken)
        kernel = _gate(BITS[x.dtype], BITS[self._taken])
        _run(kernel, x.numel(), x.data_ptr(), output.data_ptr(), len(x), size)
        return output

    def add(self, x: Tensor, y: Tensor) -> None:
        """See Operations.add."""
        if x.numel() % LANES:
            self._torch.add(x, y)
            return
        assert x.is_contiguous(), "states are changed in place"
        y = y.contiguous()
        _run(_add(BITS[y.dtype]), x.numel(), x.data_ptr(), y.data_ptr(), x.numel())


def _run(kernel: Kernel, num_numbers: int, *arguments: float) -> None:
    if num_numbers < _SHARED_NUMBERS:
        kernel.alone(*arguments)
    else:
        kernel(*arguments)


class SimdNorm:
    """A Norm in one pass."""

    def __init__(self, weight: Tensor, eps: float, taken: torch.dtype) -> None:
        """`weight` [D] float32, D a multiple of LANES."""
        self._weight = weight.contiguous()
        self._eps = eps
        self._taken = taken

    def __call__(self, x: Tensor) -> Tensor:
        """See Norm."""
        return self._normed(x, None)

    def after_adding(self, x: Tensor, y: Tensor) -> Tensor:
        """See Norm.after_adding."""
        return self._normed(x, y)

    def add_to(
        self, program: Program, x: Later, added: Later | None, num_rows: Later, output: Later
    ) -> None:
        """As a part of `program`: `after_adding` float32 rows, if there are any."""
        program.add(
            _norm(32, BITS[self._taken]),
            x=x,
            added=0 if added is None else added,
            weight=self._weight.data_ptr(),
            output=output,
            num_rows=num_rows,
            size=len(self._weight),
            eps=self._eps,
        )

    def _normed(self, x: Tensor, y: Tensor | None) -> Tensor:
        assert x.is_contiguous(), "states are changed in place"
        output = torch.empty_like(x, dtype=self._taken)
        added = x if y is None else y.contiguous()
        _run(
            _norm(BITS[added.dtype], BITS[self._taken]),
            x.numel(),
            x.data_ptr(),
            0 if y is None else added.data_ptr(),
            self._weight.data_ptr(),
            output.data_ptr(),
            len(x),
            x.shape[1],
            self._eps,
        )
        return output


class SimdRotation:
    """A Rotation in one pass.

    Attributes:
        heads: of the layer.
    """

    def __init__(self, heads: Heads) -> None:
        self.heads = heads
        self._norm = None if heads.norm is None else heads.norm.float().contiguous()

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See Rotation."""
        heads = self.heads
        x = x.contiguous()
        output = x if heads.dtype == x.dtype else torch.empty_like(x, dtype=heads.dtype)
        _run(
            _rotation(heads.dim, BITS[x.dtype], BITS[heads.dtype]),
            x.numel(),
            x.data_ptr(),
            output.data_ptr(),
            cos.data_ptr(),
            sin.data_ptr(),
            0 if self._norm is None else self._norm.data_ptr(),
            len(x),
            heads.num_heads + heads.num_kv_heads,
            heads.num_kv_heads,
            heads.eps,
        )
        queries, keys, values = output.split_with_sizes(
            (heads.num_heads, heads.num_kv_heads, heads.num_kv_heads), 1
        )
        return queries, keys, values

    def add_to(
        self, program: Program, x: Later, cos: Later, sin: Later, num_rows: Later, output: Later
    ) -> None:
        """As a part of `program`, of float32 rows; a thread takes its `part` and waits for none.

        `output` may be `x` where as many bits are attended to.
        """
        heads = self.heads
        program.add(
            _rotation(heads.dim, 32, BITS[heads.dtype]),
            waits=False,
            x=x,
            output=output,
            cos=cos,
            sin=sin,
            norm=0 if self._norm is None else self._norm.data_ptr(),
            num_rows=num_rows,
            num_rotated=heads.num_heads + heads.num_kv_heads,
            num_values=heads.num_kv_heads,
            eps=heads.eps,
        )


def add_gate(
    program: Program, x: Later, num_rows: Later, size: int, taken: torch.dtype, output: Later
) -> None:
    """`SimdOperations.gate` as a part of `program`, of float32 rows to `size` numbers each."""
    kernel = _gate(32, BITS[taken])
    program.add(kernel, x=x, output=output, num_rows=num_rows, size=size)


@cache
def _norm(added_bits: int, output_bits: int) -> Kernel:
    @compiled
    def body(a: Any, thread: Any, num_threads: Any) -> None:
        first, end = part(a.num_rows, thread, num_threads)
        for row in range(first, end):
            first_number = row * a.size
            squares = vectors.splat(_ZERO, LANES)
            for column in range(0, a.size, LANES):
                number = first_number + column
                x = vectors.load(a.x + number * 4, LANES, 32)
                if a.added:
                    place = a.added + number * added_bits // 8
                    x = vectors.add(x, vectors.load(place, LANES, added_bits))
                    vectors.store(a.x + number * 4, x, 32)
                squares = vectors.multiply_add(x, x, squares)
            mean = vectors.total(squares) / np.float32(a.size)
            factor = vectors.splat(_ONE / np.float32(sqrt(mean + np.float32(a.eps))), LANES)
            for column in range(0, a.size, LANES):
                number = first_number + column
                x = vectors.multiply(vectors.load(a.x + number * 4, LANES, 32), factor)
                y = vectors.multiply(x, vectors.load(a.weight + column * 4, LANES, 32))
                vectors.store(a.output + number * output_bits // 8, y, output_bits)

    return Kernel(
        body,
        {
            "x": "q",
            "added": "q",
            "weight": "q",
            "output": "q",
            "num_rows": "q",
            "size": "q",
            "eps": "d",
        },
    )


@cache
def _add(added_bits: int) -> Kernel:
    @compiled
    def body(a: Any, thread: Any, num_threads: Any) -> None:
        first, end = part(a.size // LANES, thread, num_threads)
        for number in range(first * LANES, end * LANES, LANES):
            x = vectors.load(a.x + number * 4, LANES, 32)
            y = vectors.load(a.added + number * added_bits // 8, LANES, added_bits)
            vectors.store(a.x + number * 4, vectors.add(x, y), 32)

    return Kernel(body, {"x": "q", "added": "q", "size": "q"})


@cache
def _gate(input_bits: int, output_bits: int) -> Kernel:
    item = input_bits // 8

    @compiled
    def body(a: Any, thread: Any, num_threads: Any) -> None:
        one, zero = vectors.splat(_ONE, LANES), vectors.splat(_ZERO, LANES)
        width = a.size // LANES
        first, end = part(a.num_rows * width, thread, num_threads)
        for number in range(first, end):
            row, column = number // width, number % width * LANES
            place = a.x + (row * a.size * 2 + column) * item
            x = vectors.load(place, LANES, input_bits)
            y = vectors.multiply(x, vectors.load(place + a.size * item, LANES, input_bits))
            y = vectors.divide(y, vectors.add(one, exp(vectors.subtract(zero, x))))
            place = a.output + (row * a.size + column) * output_bits // 8
            vectors.store(place, y, output_bits)

    return Kernel(body, {"x": "q", "output": "q", "num_rows": "q", "size": "q"})


@cache
def _rotation(dim: int, input_bits: int, output_bits: int) -> Kernel:
    half = dim // 2

    @compiled
    def body(a: Any, thread: Any, num_threads: Any) -> None:
        first, end = part(a.num_rows, thread, num_threads)
        num_heads = a.num_rotated + a.num_values
        for row in range(first, end):
            cos, sin = a.cos + row * dim * 4, a.sin + row * dim * 4
            cos_low, sin_low = vectors.load(cos, half, 32), vectors.load(sin, half, 32)
            cos_high = vectors.load(cos + half * 4, half, 32)
            sin_high = vectors.load(sin + half * 4, half, 32)
            for head in range(num_heads):
                number = row * num_heads + head
                place = a.x + number * dim * input_bits // 8
                low = vectors.load(place, half, input_bits)
                high = vectors.load(place + half * input_bits // 8, half, input_bits)
                if head < a.num_rotated:
                    if a.norm:
                        squares = vectors.multiply_add(low, low, vectors.multiply(high, high))
                        mean = vectors.total(squares) / np.float32(dim)
                        factor = _ONE / np.float32(sqrt(mean + np.float32(a.eps)))
                        weight = a.norm + head * dim * 4
                        low = vectors.multiply(low, vectors.splat(factor, half))
                        high = vectors.multiply(high, vectors.splat(factor, half))
                        low = vectors.multiply(low, vectors.load(weight, half, 32))
                        high = vectors.multiply(high, vectors.load(weight + half * 4, half, 32))
                    turned = vectors.multiply_add(high, sin_low, vectors.multiply(low, cos_low))
                    high = vectors.multiply_add(low, sin_high, vectors.multiply(high, cos_high))
                    low = turned
                place = a.output + number * dim * output_bits // 8
                vectors.store(place, low, output_bits)
                vectors.store(place + half * output_bits // 8, high, output_bits)

    return Kernel(
        body,
        {
            "x": "q",
            "output": "q",
            "cos": "q",
            "sin": "q",
            "norm": "q",
            "num_rows": "q",
            "num_rotated": "q",
            "num_values": "q",
            "eps": "d",
        },
    )
