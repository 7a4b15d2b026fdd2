"""Functions of vectors, for use in kernels."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from server.simd import vectors
from server.simd.compiled import compiled
from server.simd.vectors import LANES

# Cephes' expf: coefficients of a polynomial on [-ln 2 / 2, ln 2 / 2], and ln 2 in two parts, of
# which the first is short so that multiples of it are exact.
_LOG2_E = np.float32(1.4426950408889634)
_LN2_HIGH = np.float32(-0.693359375)
_LN2_LOW = np.float32(2.12194440e-4)
_C0 = np.float32(1.9875691500e-4)
_C1 = np.float32(1.3981999507e-3)
_C2 = np.float32(8.3334519073e-3)
_C3 = np.float32(4.1665795894e-2)
_C4 = np.float32(1.6666665459e-1)
_C5 = np.float32(5.0000001201e-1)
# Cephes' logf: coefficients of a polynomial on [sqrt(1/2) - 1, sqrt(2) - 1].
_L0 = np.float32(7.0376836292e-2)
_L1 = np.float32(-1.1514610310e-1)
_L2 = np.float32(1.1676998740e-1)
_L3 = np.float32(-1.2420140846e-1)
_L4 = np.float32(1.4249322787e-1)
_L5 = np.float32(-1.6668057665e-1)
_L6 = np.float32(2.0000714765e-1)
_L7 = np.float32(-2.4999993993e-1)
_L8 = np.float32(3.3333331174e-1)
_SQRT_2 = np.float32(1.4142135623730951)
_ZERO, _HALF, _ONE = np.float32(0.0), np.float32(0.5), np.float32(1.0)
# What is copied at once, in bytes.
UNIT = 16
_UNIT_LANES = UNIT // 4
# Below lie numbers too small for float32, above those too large.
_LEAST, _MOST = np.float32(-87.0), np.float32(88.0)


@njit(inline="always")
def exp(x: Any) -> Any:
    """E ** x of a Vector(LANES), to 2e-7 of it; below -87 and above 88 as there."""
    x = vectors.larger(x, vectors.splat(_LEAST, LANES))
    x = vectors.smaller(x, vectors.splat(_MOST, LANES))
    n = vectors.floor(
        vectors.multiply_add(x, vectors.splat(_LOG2_E, LANES), vectors.splat(_HALF, LANES))
    )
    x = vectors.multiply_add(n, vectors.splat(_LN2_HIGH, LANES), x)
    x = vectors.multiply_add(n, vectors.splat(_LN2_LOW, LANES), x)
    y = vectors.splat(_C0, LANES)
    y = vectors.multiply_add(y, x, vectors.splat(_C1, LANES))
    y = vectors.multiply_add(y, x, vectors.splat(_C2, LANES))
    y = vectors.multiply_add(y, x, vectors.splat(_C3, LANES))
    y = vectors.multiply_add(y, x, vectors.splat(_C4, LANES))
    y = vectors.multiply_add(y, x, vectors.splat(_C5, LANES))
    y = vectors.add(vectors.multiply_add(vectors.multiply(y, x), x, x), vectors.splat(_ONE, LANES))
    return vectors.multiply(y, vectors.power_of_two(n))


@compiled
def log1p(x: Any) -> Any:
    """Natural logarithm of 1 + x of a Vector(LANES) above -1 and not above 0, to 3e-7 of it."""
    one = vectors.splat(_ONE, LANES)
    y = vectors.add(one, x)
    n = vectors.exponent(vectors.multiply(y, vectors.splat(_SQRT_2, LANES)))
    zero = vectors.splat(_ZERO, LANES)
    y = vectors.multiply(y, vectors.power_of_two(vectors.subtract(zero, n)))
    # Near 0 `y` has lost what is left of x beside 1.
    x = vectors.where_less(n, zero, vectors.subtract(y, one), x)
    square = vectors.multiply(x, x)
    y = vectors.splat(_L0, LANES)
    y = vectors.multiply_add(y, x, vectors.splat(_L1, LANES))
    y = vectors.multiply_add(y, x, vectors.splat(_L2, LANES))
    y = vectors.multiply_add(y, x, vectors.splat(_L3, LANES))
    y = vectors.multiply_add(y, x, vectors.splat(_L4, LANES))
    y = vectors.multiply_add(y, x, vectors.splat(_L5, LANES))
    y = vectors.multiply_add(y, x, vectors.splat(_L6, LANES))
    y = vectors.multiply_add(y, x, vectors.splat(_L7, LANES))
    y = vectors.multiply_add(y, x, vectors.splat(_L8, LANES))
    y = vectors.multiply(y, vectors.multiply(x, square))
    y = vectors.subtract(y, vectors.multiply(n, vectors.splat(_LN2_LOW, LANES)))
    y = vectors.multiply_add(vectors.splat(-_HALF, LANES), square, y)
    y = vectors.add(x, y)
    return vectors.subtract(y, vectors.multiply(n, vectors.splat(_LN2_HIGH, LANES)))


@compiled
def copy(source: Any, target: Any, size: Any) -> None:
    """Some bytes, a multiple of UNIT, from one address to another."""
    for offset in range(0, size, UNIT):
        # Whatever the numbers are, their bits are copied.
        vectors.store(target + offset, vectors.load(source + offset, _UNIT_LANES, 32), 32)
