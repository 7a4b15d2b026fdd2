"""Passes over one row of scores or of weights, which are probabilities but for a factor.

Rows are named by their address and are float32, padded to whole blocks of columns.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from server.simd import vectors
from server.simd.compiled import compiled
from server.simd.functions import exp
from server.simd.vectors import LANES, NUMBER

BLOCK = 16 * LANES  # columns that are added up together
VECTOR = LANES * NUMBER  # bytes of a Vector(LANES) in memory
INVALID = -1  # no column at all
# A score of -inf, as finite numbers have it. Where scores are combined, a negative weight takes it
# for the second, as in `decoding.combine`.
NEVER, _FLOOR = np.float32(-1e30), np.float32(-1e4)
NOTHING = np.float32(-5e29)  # of what there is, scores are larger, and their sums

_LEAST = np.float32(-87.0)  # logarithm of the least probability, beside the largest, that is not 0
_ZERO, _ONE = np.float32(0.0), np.float32(1.0)


@compiled
def padded(num_columns: Any) -> Any:
    """Columns of whole blocks."""
    return (num_columns + BLOCK - 1) // BLOCK * BLOCK


def _adder(bits: int, lanes: int) -> Any:
    """Code that adds scaled scores to a row, `lanes` at once."""

    @compiled
    def run(
        target: Any, scores: Any, scale: Any, first: Any, end: Any, is_first: Any, bad: Any
    ) -> Any:
        """Returns the largest sum, and `bad` or more where a score is no number."""
        factor = vectors.splat(scale, lanes)
        never, limit = vectors.splat(NEVER, lanes), vectors.splat(-NEVER, lanes)
        least = vectors.splat(_FLOOR if scale < _ZERO else np.float32(-np.inf), lanes)
        one = vectors.splat(_ONE, lanes)
        largest, faults = never, vectors.splat(bad, lanes)
        for column in range(first, end, lanes):
            x = vectors.load(scores + column * (bits // 8), lanes, bits)
            x = vectors.where_less(x, least, least, x)
            x = vectors.product(x, factor)
            faults = vectors.where_less(x, limit, faults, one)
            x = vectors.where_less(x, limit, x, limit)
            x = vectors.where_less(never, x, x, never)
            place = target + column * NUMBER
            if not is_first:
                x = vectors.add(x, vectors.load(place, lanes, 32))
            vectors.store(place, x, 32)
            largest = vectors.larger(largest, x)
        return vectors.largest(largest), vectors.largest(faults)

    return run


_add_wide, _add_one_wide = _adder(32, LANES), _adder(32, 1)
_add_narrow, _add_one_narrow = _adder(16, LANES), _adder(16, 1)


@compiled
def add_scores(target: Any, scores: Any, bits: Any, scale: Any, size: Any, is_first: Any) -> Any:
    """Add scaled scores to a row, or write them into it and NEVER behind them, up to a block.

    Returns the largest sum; NEVER if there is none, or where a score is no number.
    """
    whole = size // LANES * LANES
    if bits == 16:
        largest, bad = _add_narrow(target, scores, scale, 0, whole, is_first, _ZERO)
        last, bad = _add_one_narrow(target, scores, scale, whole, size, is_first, bad)
    else:
        largest, bad = _add_wide(target, scores, scale, 0, whole, is_first, _ZERO)
        last, bad = _add_one_wide(target, scores, scale, whole, size, is_first, bad)
    for column in range(size, padded(size)):
        vectors.store_number(target + column * NUMBER, NEVER)
    largest = max(largest, last)
    return largest if bad == _ZERO and largest > NOTHING else NEVER


@compiled
def drop_where_less(row: Any, others: Any, size: Any, floor: Any) -> Any:
    """Make scores NEVER where `others` are less than `floor`; returns the largest that is left."""
    never, limit = vectors.splat(NEVER, LANES), vectors.splat(floor, LANES)
    largest = never
    for column in range(0, size * NUMBER, VECTOR):
        x = vectors.load(row + column, LANES, 32)
        x = vectors.where_less(vectors.load(others + column, LANES, 32), limit, never, x)
        vectors.store(row + column, x, 32)
        largest = vectors.larger(largest, x)
    return vectors.largest(largest)


@compiled
def exponentials(row: Any, size: Any, largest: Any) -> Any:
    """In place of scores, whole blocks of them; returns their sum, 0 if there is no `largest`."""
    if not largest > NEVER:
        return _ZERO
    total = 0.0
    least = vectors.splat(_LEAST, LANES)
    for start in range(row, row + size * NUMBER, BLOCK * NUMBER):
        part_sum = vectors.splat(_ZERO, LANES)
        for place in range(start, start + BLOCK * NUMBER, VECTOR):
            x = vectors.load(place, LANES, 32)
            x = vectors.subtract(x, vectors.splat(largest, LANES))
            y = vectors.where_less(x, least, vectors.splat(_ZERO, LANES), exp(x))
            vectors.store(place, y, 32)
            part_sum = vectors.add(part_sum, y)
        total += vectors.total(part_sum)
    return np.float32(total)


@compiled
def add_row(row: Any, others: Any, size: Any, factor: Any, is_first: Any) -> Any:
    """Add `factor` times `others`, or write it."""
    for column in range(0, size * NUMBER, VECTOR):
        x = vectors.multiply(vectors.load(others + column, LANES, 32), vectors.splat(factor, LANES))
        if not is_first:
            x = vectors.add(x, vectors.load(row + column, LANES, 32))
        vectors.store(row + column, x, 32)


@compiled
def take_row(row: Any, others: Any, size: Any, factor: Any) -> None:
    """Take `factor` times `others` away, where that is more, all."""
    for column in range(0, size * NUMBER, VECTOR):
        x = vectors.multiply(vectors.load(others + column, LANES, 32), vectors.splat(factor, LANES))
        x = vectors.subtract(vectors.load(row + column, LANES, 32), x)
        vectors.store(row + column, vectors.larger(x, vectors.splat(_ZERO, LANES)), 32)


@compiled
def largest_of(row: Any, size: Any) -> Any:
    """Of whole blocks."""
    found = vectors.load(row, LANES, 32)
    for place in range(row, row + size * NUMBER, VECTOR):
        found = vectors.larger(found, vectors.load(place, LANES, 32))
    return vectors.largest(found)


@compiled
def find(row: Any, number: Any) -> Any:
    """The first column with a `number` that is the row's largest."""
    block = 0
    while largest_of(row + block * NUMBER, BLOCK) < number:
        block += BLOCK
    while vectors.load_number(row + block * NUMBER) < number:
        block += 1
    return block


@compiled
def draw(row: Any, size: Any, sums: Any, uniform: Any) -> Any:
    """A column by inverse CDF over weights; INVALID if there is nothing to draw from.

    `sums` has room for those of the row's blocks.
    """
    total = 0.0
    for block in range(size // BLOCK):
        start = row + block * BLOCK * NUMBER
        block_sum = vectors.splat(_ZERO, LANES)
        for place in range(start, start + BLOCK * NUMBER, VECTOR):
            block_sum = vectors.add(block_sum, vectors.load(place, LANES, 32))
        mass = vectors.total(block_sum)
        vectors.store_number(sums + block * NUMBER, mass)
        total += mass
    if not total > 0.0:
        return INVALID
    threshold = uniform * total  # below the total, for a uniform is below 1 by more than rounding
    before = 0.0
    block = 0
    while before + vectors.load_number(sums + block * NUMBER) <= threshold:
        before += vectors.load_number(sums + block * NUMBER)
        block += 1
    found = INVALID
    for column in range(block * BLOCK, (block + 1) * BLOCK):
        mass = vectors.load_number(row + column * NUMBER)
        if mass > _ZERO:
            found = column
            before += mass
            if before > threshold:
                break
    return found
