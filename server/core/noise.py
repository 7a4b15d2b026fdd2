"""The hash that gives each token of a row its noise; `decoding.rng` and `simd.noise` compute it.

A token's number times FACTORS[0] and the first half of its row's key are added up; then come
x ^= x >> SHIFTS[0], x *= FACTORS[1], x ^= x >> SHIFTS[1], the second half is added, x *= FACTORS[2]
and x ^= x >> SHIFTS[2], all in 32 bits. The lower BITS and a half, as a fraction of 2 ** BITS, are
a uniform, but at most LARGEST; its Exp(1) number is the noise.
"""

from __future__ import annotations

# The golden ratio's, and two of a well-mixing 32-bit hash: triple32's (Wellons 2018).
FACTORS = (0x7F4A7C15, 0xAC4C1B51, 0x31848BAB)
SHIFTS = (16, 15, 15)
BITS = 31
LARGEST = 1 - 2.0**-24
