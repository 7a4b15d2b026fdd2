"""Leaving out the improbable tokens of a row: min-p, top-k and top-p, as `decoding.warp` has them.

A row's weights are probabilities times a number that makes the largest of them 1. What is kept are
all weights from a threshold on. It lies among the largest ones, which are gathered first, so that
few passes are over the whole row, and none sorts it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from server.simd import vectors
from server.simd.compiled import compiled
from server.simd.vectors import LANES, NUMBER
from server.simd.weights import BLOCK, VECTOR

NUM_LIMITS = 3  # float32 numbers: min-p, top-k, top-p; 0, 0 and 1 leave nothing out

_ZERO, _ONE, _ANY = np.float32(0.0), np.float32(1.0), np.float32(np.inf)
_BITS_OF_ONE = 0x3F800000  # float32 numbers from 0 on are ordered as their bits are
# Weights above the first are gathered, or above so much less as it takes.
_FIRST_FLOOR, _STEP, _LAST_FLOOR = np.float32(0.02), np.float32(0.05), np.float32(1e-30)


@compiled
def truncate(row: Any, size: Any, total: Any, limits: Any, room: Any) -> Any:
    """Make 0 of what is left out; returns the sum of the rest.

    Args:
        row: address of weights, of which the largest is 1.
        size: their number, that of whole blocks.
        total: their sum, float32.
        limits: address of NUM_LIMITS numbers.
        room: for as many weights.
    """
    min_p = vectors.load_number(limits)
    top_k = vectors.load_number(limits + NUMBER)
    top_p = vectors.load_number(limits + 2 * NUMBER)
    if top_k >= size:
        top_k = _ZERO
    if min_p > _ZERO:
        total = _keep(row, size, min_p)
    if top_k == _ZERO and top_p >= _ONE:
        return total
    count, threshold = _gather(row, size, total, top_k, top_p, room)
    if top_k > _ZERO:
        threshold = max(threshold, _threshold(room, count, top_k, _ANY))
        above, mass = _above(room, count, threshold)
        # Of so many, whatever ties with the last.
        total = np.float32(mass + (top_k - above) * threshold)
    if top_p < _ONE:
        threshold = max(threshold, _threshold(room, count, _ANY, top_p * total))
    return _keep(row, size, threshold)


@compiled
def _gather(row: Any, size: Any, total: Any, top_k: Any, top_p: Any, room: Any) -> Any:
    """Copy the largest weights, with the threshold among them.

    Returns how many, whole blocks of them, and what they are above.
    """
    floor = _FIRST_FLOOR
    while floor > _ZERO:
        above, mass = _above(row, size, floor)
        if above >= top_k if top_k > _ZERO else mass >= top_p * total:
            break
        floor = floor * _STEP if floor > _LAST_FLOOR else _ZERO
    count = 0
    never = vectors.splat(floor, LANES)
    for place in range(row, row + size * NUMBER, VECTOR):
        if vectors.largest(vectors.subtract(vectors.load(place, LANES, 32), never)) > _ZERO:
            for column in range(place, place + VECTOR, NUMBER):
                weight = vectors.load_number(column)
                if weight > floor:
                    vectors.store_number(room + count * NUMBER, weight)
                    count += 1
    while count % BLOCK:
        vectors.store_number(room + count * NUMBER, _ZERO)
        count += 1
    return count, floor


@compiled
def _threshold(row: Any, size: Any, count: Any, mass: Any) -> Any:
    """The least weight that less than `count` and less than `mass` are larger than.

    That is 1 if there is none, and 0 if it is all of them.
    """
    if _is_kept(row, size, _ZERO, count, mass):
        return _ZERO
    below, kept = 0, _BITS_OF_ONE
    while kept - below > 1:
        middle = (below + kept) // 2
        if _is_kept(row, size, vectors.of_bits(middle), count, mass):
            kept = middle
        else:
            below = middle
    return vectors.of_bits(kept)


@compiled
def _is_kept(row: Any, size: Any, weight: Any, count: Any, mass: Any) -> Any:
    above, their_mass = _above(row, size, weight)
    return above < count and their_mass < mass


@compiled
def _above(row: Any, size: Any, floor: Any) -> Any:
    """How many weights are above `floor`, and their sum; float32 and float64."""
    zero, one = vectors.splat(_ZERO, LANES), vectors.splat(_ONE, LANES)
    limit = vectors.splat(floor, LANES)
    count, mass = zero, 0.0
    for start in range(row, row + size * NUMBER, BLOCK * NUMBER):
        block_sum = zero
        for place in range(start, start + BLOCK * NUMBER, VECTOR):
            x = vectors.load(place, LANES, 32)
            count = vectors.add(count, vectors.where_less(limit, x, one, zero))
            block_sum = vectors.add(block_sum, vectors.where_less(limit, x, x, zero))
        mass += vectors.total(block_sum)
    return vectors.total(count), mass


@compiled
def _keep(row: Any, size: Any, least: Any) -> Any:
    """Make 0 of weights below `least`; returns the sum of the rest, float32."""
    zero, limit = vectors.splat(_ZERO, LANES), vectors.splat(least, LANES)
    total = 0.0
    for start in range(row, row + size * NUMBER, BLOCK * NUMBER):
        block_sum = zero
        for place in range(start, start + BLOCK * NUMBER, VECTOR):
            x = vectors.load(place, LANES, 32)
            x = vectors.where_less(x, limit, zero, x)
            vectors.store(place, x, 32)
            block_sum = vectors.add(block_sum, x)
        total += vectors.total(block_sum)
    return np.float32(total)
