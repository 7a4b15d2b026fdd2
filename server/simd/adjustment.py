"""Changing scores of single tokens of a row, as `decoding.warp` does before temperature.

A row's columns are the tokens 0, 1, 2, ... or, of a shortlist, those of its ids, which ascend.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from server.simd import vectors
from server.simd.compiled import compiled
from server.simd.vectors import LANES, NUMBER, WHOLE
from server.simd.weights import INVALID, NEVER, NOTHING

_ZERO = np.float32(0.0)
_BITS = 8  # of a byte of a mask


@compiled
def change(row: Any, size: Any, ids: Any, tokens: Any, changes: Any, count: Any) -> None:
    """Divide or multiply scores, so that they fall, and add to them, one after the other.

    Args:
        row: address of scores.
        size: columns.
        ids: address of int64 [size], tokens; or 0.
        tokens: address of int64 [count], whose scores are changed; those without a column are not.
        changes: address of float32 [count, 2]: what positive scores are divided by and others
            multiplied with, and what is added then.
        count: of changes.
    """
    for number in range(count):
        token = vectors.load_whole(tokens + number * WHOLE)
        column = token if ids == 0 else column_of(ids, size, token)
        if column == INVALID:
            continue
        score = vectors.load_number(row + column * NUMBER)
        if score > NOTHING:
            factor = vectors.load_number(changes + 2 * number * NUMBER)
            score = score / factor if score > _ZERO else score * factor
            score += vectors.load_number(changes + 2 * number * NUMBER + NUMBER)
            vectors.store_number(row + column * NUMBER, max(NEVER, score))


@compiled
def ban(row: Any, size: Any, ids: Any, tokens: Any, changes: Any, count: Any) -> None:
    """Of the changes of `change` those alone that leave a token no probability."""
    for number in range(count):
        if vectors.load_number(changes + 2 * number * NUMBER + NUMBER) < NEVER:
            token = vectors.load_whole(tokens + number * WHOLE)
            column = token if ids == 0 else column_of(ids, size, token)
            if column != INVALID:
                vectors.store_number(row + column * NUMBER, NEVER)


@compiled
def forbid(row: Any, size: Any, ids: Any, mask: Any) -> None:
    """Make scores NEVER of tokens whose bit is not set.

    Args:
        row: address of scores.
        size: columns; those of whole vectors, where there are no ids.
        ids: address of int64 [size], tokens; or 0.
        mask: address of bits; of token t, bit t % 8 of byte t // 8.
    """
    if ids == 0:
        never = vectors.splat(NEVER, LANES)
        for column in range(0, size, LANES):
            place = row + column * NUMBER
            x = vectors.load(place, LANES, 32)
            vectors.store(place, vectors.where_bits(mask + column // _BITS, x, never), 32)
    else:
        for column in range(size):
            if not vectors.is_set(mask, vectors.load_whole(ids + column * WHOLE)):
                vectors.store_number(row + column * NUMBER, NEVER)


@compiled
def column_of(ids: Any, size: Any, token: Any) -> Any:
    """Where `token` is among int64 [size] that ascend; INVALID: nowhere."""
    first, end = 0, size
    while first < end:
        middle = (first + end) // 2
        if vectors.load_whole(ids + middle * WHOLE) < token:
            first = middle + 1
        else:
            end = middle
    if first < size and vectors.load_whole(ids + first * WHOLE) == token:
        return first
    return INVALID
