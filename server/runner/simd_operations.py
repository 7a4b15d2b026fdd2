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
from numba import njit
from torch import Tensor

from server.runner.operations import Heads, Norm, Rotation, TorchOperations
from server.simd import vectors
from server.simd.functions import exp
from server.simd.kernel import Kernel
from server.simd.vectors import LANES

_ZERO, _ONE = np.float32(0.0), np.float32(1.0)
_BITS = {torch.float32: 32, torch.bfloat16: 16}
# Numbers from which an operation is shared between threads: waking them takes a microsecond.
_SHARED_NUMBERS = 16384


class SimdOperations:
    """Operations of float32 states on the CPU; of sizes that no vector fits, torch's."""

    def __init__(self) -> None:
        self._torch = TorchOperations()

    def norm(self, weight: Tensor, eps: float) -> Norm:
        """See Operations.norm."""
        if len(weight) % LANES:
            return self._torch.norm(weight, eps)
        return _SimdNorm(weight, eps)

    def rotation(self, heads: Heads) -> Rotation:
        """See Operations.rotation."""
        return _SimdRotation(heads)

    def gate(self, x: Tensor) -> Tensor:
        """See Operations.gate."""
        size = x.shape[1] // 2
        if size % LANES or not x.is_contiguous():
            return self._torch.gate(x)
        output = x.new_empty(len(x), size)
        _run(_gate(), x.numel(), x.data_ptr(), output.data_ptr(), len(x), size)
        return output


def _run(kernel: Kernel, num_numbers: int, *arguments: float) -> None:
    if num_numbers < _SHARED_NUMBERS:
        kernel.alone(*arguments)
    else:
        kernel(*arguments)


class _SimdNorm:
    def __init__(self, weight: Tensor, eps: float) -> None:
        """`weight` [D] float32, D a multiple of LANES."""
        self._weight = weight.contiguous()
        self._eps = eps

    def __call__(self, x: Tensor) -> Tensor:
        return self._normed(x, None)

    def after_adding(self, x: Tensor, y: Tensor) -> Tensor:
        return self._normed(x, y)

    def _normed(self, x: Tensor, y: Tensor | None) -> Tensor:
        assert x.is_contiguous(), "states are changed in place"
        output = torch.empty_like(x)
        added = 0
        if y is not None:
            y = y.to(x.dtype).contiguous()
            added = y.data_ptr()
        _run(
            _norm(),
            x.numel(),
            x.data_ptr(),
            added,
            self._weight.data_ptr(),
            output.data_ptr(),
            len(x),
            x.shape[1],
            self._eps,
        )
        return output


class _SimdRotation:
    def __init__(self, heads: Heads) -> None:
        self._heads = heads
        self._norm = None if heads.norm is None else heads.norm.float().contiguous()
        self._kernel = _rotation(heads.dim, _BITS[heads.dtype])

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        heads = self._heads
        x = x.contiguous()
        output = x if heads.dtype == x.dtype else torch.empty_like(x, dtype=heads.dtype)
        _run(
            self._kernel,
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
        sizes = (heads.num_heads, heads.num_kv_heads, heads.num_kv_heads)
        queries, keys, values = output.split_with_sizes(sizes, 1)
        return queries, keys, values


@njit
def _part(count: Any, thread: Any, num_threads: Any) -> Any:
    """A thread's part of `count`: from the first to before the second."""
    return count * thread // num_threads, count * (thread + 1) // num_threads


@cache
def _norm() -> Kernel:
    @njit
    def body(a: Any, thread: Any, num_threads: Any) -> None:
        first, end = _part(a.num_rows, thread, num_threads)
        for row in range(first, end):
            offset = row * a.size * 4
            squares = vectors.splat(_ZERO, LANES)
            for column in range(0, a.size * 4, LANES * 4):
                x = vectors.load(a.x + offset + column, LANES, 32)
                if a.added:
                    x = vectors.add(x, vectors.load(a.added + offset + column, LANES, 32))
                    vectors.store(a.x + offset + column, x, 32)
                squares = vectors.multiply_add(x, x, squares)
            mean = vectors.total(squares) / np.float32(a.size)
            factor = vectors.splat(_ONE / np.float32(sqrt(mean + np.float32(a.eps))), LANES)
            for column in range(0, a.size * 4, LANES * 4):
                x = vectors.multiply(vectors.load(a.x + offset + column, LANES, 32), factor)
                y = vectors.multiply(x, vectors.load(a.weight + column, LANES, 32))
                vectors.store(a.output + offset + column, y, 32)

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
def _gate() -> Kernel:
    @njit
    def body(a: Any, thread: Any, num_threads: Any) -> None:
        one, zero = vectors.splat(_ONE, LANES), vectors.splat(_ZERO, LANES)
        width = a.size // LANES
        first, end = _part(a.num_rows * width, thread, num_threads)
        for number in range(first, end):
            row, column = number // width, number % width * LANES * 4
            place = a.x + row * a.size * 8 + column
            x = vectors.load(place, LANES, 32)
            y = vectors.multiply(x, vectors.load(place + a.size * 4, LANES, 32))
            y = vectors.divide(y, vectors.add(one, exp(vectors.subtract(zero, x))))
            vectors.store(a.output + row * a.size * 4 + column, y, 32)

    return Kernel(body, {"x": "q", "output": "q", "num_rows": "q", "size": "q"})


@cache
def _rotation(dim: int, bits: int) -> Kernel:
    half, item = dim // 2, bits // 8

    @njit
    def body(a: Any, thread: Any, num_threads: Any) -> None:
        first, end = _part(a.num_rows, thread, num_threads)
        num_heads = a.num_rotated + a.num_values
        for row in range(first, end):
            cos, sin = a.cos + row * dim * 4, a.sin + row * dim * 4
            cos_low, cos_high = (
                vectors.load(cos, half, 32),
                vectors.load(cos + half * 4, half, 32),
            )
            sin_low, sin_high = (
                vectors.load(sin, half, 32),
                vectors.load(sin + half * 4, half, 32),
            )
            for head in range(num_heads):
                number = row * num_heads + head
                place = a.x + number * dim * 4
                low, high = (
                    vectors.load(place, half, 32),
                    vectors.load(place + half * 4, half, 32),
                )
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
                target = a.output + number * dim * item
                vectors.store(target, low, bits)
                vectors.store(target + half * item, high, bits)

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
