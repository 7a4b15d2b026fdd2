"""The noise of `decoding.rng.exponentials`, where it is divided by."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from server.core.noise import BITS, FACTORS, LARGEST, SHIFTS
from server.simd import vectors
from server.simd.compiled import compiled
from server.simd.functions import log1p
from server.simd.vectors import FLOAT, I32, LANES, NUMBER, Vector, everywhere, same

_ZERO = np.float32(0.0)
_WHOLE = ir.VectorType(I32, LANES)
_NUMBERS = ir.VectorType(FLOAT, LANES)


@compiled
def divide_by_noise(row: Any, size: Any, tokens: Any, first: Any, second: Any) -> Any:
    """Divide each weight by its token's noise, in place; returns the largest quotient, 0 for none.

    Args:
        row: address of weights, none of them negative.
        size: their number, that of whole vectors.
        tokens: address of what tokens they are, float32; 0: they are 0, 1, 2, ...
        first: half of the row's key, 32 bits.
        second: the other half.
    """
    zero = vectors.splat(_ZERO, LANES)
    largest = zero
    for column in range(0, size, LANES):
        if tokens != 0:
            numbers = vectors.load(tokens + column * NUMBER, LANES, 32)
        else:
            numbers = _counted(column)
        uniform = _uniform(numbers, first, second)
        noise = vectors.subtract(zero, log1p(vectors.subtract(zero, uniform)))
        place = row + column * NUMBER
        x = vectors.divide(vectors.load(place, LANES, 32), noise)
        vectors.store(place, x, 32)
        largest = vectors.larger(largest, x)
    return vectors.largest(largest)


@intrinsic
def _counted(context: Any, start: Any) -> Any:
    """The numbers from `start` on; a float32 number holds as many as 2 ** 24."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        first = everywhere(builder, builder.sitofp(args[0], FLOAT), LANES)
        return builder.fadd(first, ir.Constant(_NUMBERS, [float(lane) for lane in range(LANES)]))

    return Vector(LANES)(types.int64), generate


@intrinsic
def _uniform(context: Any, tokens: Any, first: Any, second: Any) -> Any:
    """Numbers above 0 and below 1; see `core.noise`."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        tokens, *keys = args
        halves = [everywhere(builder, builder.trunc(key, I32), LANES) for key in keys]
        x = builder.mul(builder.fptosi(tokens, _WHOLE), _all(FACTORS[0]))
        x = _shifted(builder, builder.add(x, halves[0]), SHIFTS[0])
        x = _shifted(builder, builder.mul(x, _all(FACTORS[1])), SHIFTS[1])
        x = builder.mul(builder.add(x, halves[1]), _all(FACTORS[2]))
        x = _shifted(builder, x, SHIFTS[2])
        x = builder.and_(x, _all((1 << BITS) - 1))
        number = builder.fadd(builder.uitofp(x, _NUMBERS), same(_NUMBERS, 0.5))
        number = builder.fmul(number, same(_NUMBERS, 2.0**-BITS))
        limit = same(_NUMBERS, LARGEST)
        return builder.select(builder.fcmp_ordered("<", number, limit), number, limit)

    return Vector(LANES)(tokens, first, second), generate


def _shifted(builder: Any, x: Any, bits: int) -> Any:
    return builder.xor(x, builder.lshr(x, _all(bits)))


def _all(number: int) -> Any:
    return same(_WHOLE, number)
