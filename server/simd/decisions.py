"""Deciding tokens: rows of scores in, tokens out.

What decides a token passes over whole rows of a vocabulary: scores are combined, made
probabilities, compared with those that a proposal was drawn from, and added up until a token is
found. Here a thread does all of it with one row after another, in memory that stays in its
processor's cache, and ends a window at its first rejected token. The rules are those of
`decoding.verify` and `decoding.combine`, which say what is decided and why that is exact.

Scores may be -inf. A row with NaN, or without any token, is no distribution.

    decider                the kernel: one window after the other
      _decide_tokens         token by token, up to the first that is rejected
        _verify                accepted, or what is drawn in its place
        _most_probable         by PICKS: the token that the proposed one has to be
      _decide_block          as a whole
        _target            of a row, the law of its token: scores combined, adjusted, truncated
        _proposal          what its token was proposed from, as comparable weights
        _recover           what replaces it: drawn from what the target has more of
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np

from server.simd import vectors
from server.simd.adjustment import ban, change, column_of, forbid
from server.simd.compiled import compiled
from server.simd.kernel import Kernel, part
from server.simd.noise import divide_by_noise
from server.simd.truncation import NUM_LIMITS, truncate
from server.simd.vectors import LANES, NUMBER, WHOLE
from server.simd.weights import (
    BLOCK,
    INVALID,
    NEVER,
    NOTHING,
    VECTOR,
    add_row,
    add_scores,
    draw,
    drop_where_less,
    exponentials,
    find,
    largest_of,
    padded,
    take_row,
)

# Where the proposal of a row came from: nobody, so that its token is drawn; a row of float32 or of
# bfloat16 scores; float32 scores of a shortlist; the text itself, which was certain of it.
DRAWN, WIDE, NARROW, SHORT, CERTAIN = range(5)
# How windows are decided: token by token, free or picked; or as blocks.
TOKENS, PICKS, BLOCKS = range(3)
NOISE = 3  # numbers; see `decider`

_ZERO, _ONE = np.float32(0.0), np.float32(1.0)

_ARGUMENTS = {
    "num_columns": "q",
    "num_models": "q",
    "num_windows": "q",
    "windows": "q",
    "scores": "q",
    "bits": "q",
    "scales": "q",
    "shares": "q",
    "floors": "q",
    "references": "q",
    "limits": "q",
    "noises": "q",
    "columns": "q",
    "ids": "q",
    "masks": "q",
    "starts": "q",
    "changed": "q",
    "changes": "q",
    "origins": "q",
    "origin_scales": "q",
    "tokens": "q",
    "accept_uniforms": "q",
    "choose_uniforms": "q",
    "rule": "q",
    "scratch": "q",
    "scratch_size": "q",
    "decisions": "q",
}


def scratch_bytes(num_columns: int) -> int:
    """Working memory of a thread: three rows, and the sums of a row's blocks."""
    num_padded: int = padded.py_func(num_columns)
    return 3 * num_padded * NUMBER + num_padded // BLOCK * NUMBER


class _Row(NamedTuple):
    """One row's law, and where it is worked out.

    Attributes:
        scores: address of [num_models] addresses of scores; 0: the model says nothing.
        scales, shares: addresses of [num_models] float32; see `decider`.
        reference: the model that judges what is plausible; -1: none does.
        floor: see `decider`.
        limits: address of what truncates it; 0: nothing.
        noise: address of its NOISE numbers; 0: none.
        mask: address of what is allowed of its tokens; 0: all of them.
        first_change, end_change: numbers of its changes.
        origin: address of four numbers: kind, scores, ids of the shortlist, and how many.
        origin_scale: of the proposal's scores.
        proposed: the token.
        weights, others, gathered, sums: scratch.
    """

    scores: Any
    scales: Any
    shares: Any
    reference: Any
    floor: Any
    limits: Any
    noise: Any
    mask: Any
    first_change: Any
    end_change: Any
    origin: Any
    origin_scale: Any
    proposed: Any
    weights: Any
    others: Any
    gathered: Any
    sums: Any


@cache
def decider() -> Kernel:
    """Decides windows; a thread takes its `part` of them. Compiled in some seconds.

    Arguments, addresses of dense arrays unless they are numbers; R rows, W windows, K models:
        num_columns, num_models, num_windows: of scores, K, W.
        windows: int64 [W + 1]; window w is of the rows from its number to before the next.
        scores: int64 [R, K] addresses of rows of scores; 0: the model says nothing.
        bits: int64 [K], of a score; see `vectors.load`.
        scales: float32 [R, K], that scores are multiplied with before they are added.
        shares: float32 [R, K]; of a row that begins with 0, scores are added; of others, each
            model's probabilities are, times its share.
        floors: float32 [R]; of a row with a reference, tokens whose scores by that model are less
            than its largest of an allowed token and this number have no probability, where scores
            are added.
        references: int64 [R], models, -1: none; or 0: no row has one.
        limits: float32 [R, NUM_LIMITS], that truncate what scores are made to, and what was
            proposed from; or 0: nothing does.
        noises: int64 [R, NOISE]: is there any, and the halves of its key (`divide_by_noise`); or 0.
        columns: float32 [num_columns, up to whole blocks], the tokens that columns stand for; or 0:
            all tokens in their order.
        ids: int64 [num_columns], the same, ascending; or 0.
        masks: int64 [R], addresses of bits of allowed tokens, as many as whole blocks of the whole
            vocabulary, or 0 (`adjustment.forbid`); or 0: no row has one.
        starts: int64 [R + 1]; row r has the changes from its number to before the next; or 0.
        changed, changes: int64 [N] and float32 [N, 2], of all rows (`adjustment.change`). Scores
            are changed, and forbidden, where they are combined and scaled.
        origins: int64 [R, 4]: what the row's token was proposed from, as in this module; the
            address of its scores; for a shortlist, that of its ids, int64, ascending; and how many.
        origin_scales: float32 [R], that those scores are multiplied with.
        tokens: int64 [R], proposed.
        accept_uniforms, choose_uniforms: float32 [R]; the second draws tokens.
        rule: TOKENS; or PICKS: tokens are the most probable ones, their probabilities divided by
            noise where there is any, and accepted if they are that; or BLOCKS.
        scratch, scratch_size: of all threads, and of one; see `scratch_bytes`.
        decisions: int64 [W, 2], written; see `decoding.verify.Decisions`.
    """

    @compiled
    def body(a: Any, thread: Any, num_threads: Any) -> None:
        room = a.scratch + thread * a.scratch_size
        first_window, last_window = part(a.num_windows, thread, num_threads)
        for window in range(first_window, last_window):
            first = vectors.load_whole(a.windows + window * WHOLE)
            end = vectors.load_whole(a.windows + (window + 1) * WHOLE)
            if a.rule == BLOCKS:
                count, token = _decide_block(a, first, end, room)
            else:
                count, token = _decide_tokens(a, first, end, room)
            vectors.store_whole(a.decisions + window * 2 * WHOLE, count)
            vectors.store_whole(a.decisions + window * 2 * WHOLE + WHOLE, token)

    return Kernel(body, _ARGUMENTS)


@compiled
def _row(a: Any, number: Any, room: Any) -> Any:
    """Row `number`, worked out in the scratch at `room`."""
    size = padded(a.num_columns) * NUMBER
    return _Row(
        a.scores + number * a.num_models * WHOLE,
        a.scales + number * a.num_models * NUMBER,
        a.shares + number * a.num_models * NUMBER,
        vectors.load_whole(a.references + number * WHOLE) if a.references else -1,
        vectors.load_number(a.floors + number * NUMBER) if a.references else _ZERO,
        a.limits + number * NUM_LIMITS * NUMBER if a.limits else 0,
        a.noises + number * NOISE * WHOLE if a.noises else 0,
        vectors.load_whole(a.masks + number * WHOLE) if a.masks else 0,
        vectors.load_whole(a.starts + number * WHOLE) if a.starts else 0,
        vectors.load_whole(a.starts + number * WHOLE + WHOLE) if a.starts else 0,
        a.origins + number * 4 * WHOLE,
        vectors.load_number(a.origin_scales + number * NUMBER),
        vectors.load_whole(a.tokens + number * WHOLE),
        room,
        room + size,
        room + 2 * size,
        room + 3 * size,
    )


@compiled
def _decide_tokens(a: Any, first: Any, end: Any, room: Any) -> Any:
    """Of a window, one by one: how many are accepted, and what replaces the first that is not."""
    token = INVALID
    for number in range(first, end):
        row = _row(a, number, room)
        if a.rule == PICKS:
            token = _most_probable(a, row)
            is_accepted = token == row.proposed and token != INVALID
        else:
            is_accepted, token = _verify(a, row, _accepting(a, number), _choosing(a, number))
        if not is_accepted:
            return number - first, token
    return end - first, token


@compiled
def _decide_block(a: Any, first: Any, end: Any, room: Any) -> Any:
    """Of a window, as a whole; see `verify.block_tests` for the names."""
    count, kept, p = 0, _ONE, _ONE
    for number in range(first, end):
        row = _row(a, number, room)
        mass = _target(a, row)
        share, given, size = _proposal(a, row, mass)
        is_valid = mass > _ZERO and share > _ZERO
        test = p
        if is_valid and number > first:
            excess = _excess(a, row, mass, p, share, size)
            rest = excess + _ONE - p
            test = excess / rest if rest > _ZERO else _ONE
        if number > first and _accepting(a, number - 1) < test:
            count, kept = number - first, p
        # 0 / 0 is a token that neither gives anything to.
        wanted = vectors.load_number(row.weights + row.proposed * NUMBER)
        p = min(_ONE, p * (wanted / given)) if is_valid and given > _ZERO else _ZERO
    if _accepting(a, end - 1) < p:
        return end - first, INVALID
    row = _row(a, first + count, room)
    mass = _target(a, row)
    share, _, size = _proposal(a, row, mass)
    if not (mass > _ZERO and share > _ZERO):
        return count, INVALID
    return count, _recover(a, row, share / kept, size, _choosing(a, first + count))


@compiled
def _accepting(a: Any, number: Any) -> Any:
    """The uniform that accepts, or not."""
    return vectors.load_number(a.accept_uniforms + number * NUMBER)


@compiled
def _choosing(a: Any, number: Any) -> Any:
    """The uniform that draws."""
    return vectors.load_number(a.choose_uniforms + number * NUMBER)


@compiled
def _most_probable(a: Any, row: Any) -> Any:
    """The token of the largest weight, or of its quotient and the noise; the first of them."""
    size = padded(a.num_columns)
    if row.noise != 0 and vectors.load_whole(row.noise) != 0:
        if not _target(a, row) > _ZERO:
            return INVALID
        first = vectors.load_whole(row.noise + WHOLE)
        second = vectors.load_whole(row.noise + 2 * WHOLE)
        largest = divide_by_noise(row.weights, size, a.columns, first, second)
        is_valid = largest > _ZERO
    elif _is_sum(row):
        largest = _mix(a, row)
        is_valid = largest > NEVER
    else:
        is_valid = _target(a, row) > _ZERO
        largest = largest_of(row.weights, size)
    return find(row.weights, largest) if is_valid else INVALID


@compiled
def _verify(a: Any, row: Any, accept: Any, choose: Any) -> Any:
    """Is the proposed token accepted, and what is drawn in its place if not."""
    mass = _target(a, row)
    if not mass > _ZERO:
        return False, INVALID
    if vectors.load_whole(row.origin) == DRAWN:
        return False, draw(row.weights, padded(a.num_columns), row.sums, choose)
    share, given, size = _proposal(a, row, mass)
    if not share > _ZERO:
        return False, INVALID
    if accept * given < vectors.load_number(row.weights + row.proposed * NUMBER):
        return True, row.proposed
    return False, _recover(a, row, share, size, choose)


@compiled
def _recover(a: Any, row: Any, share: Any, size: Any, choose: Any) -> Any:
    """What replaces a rejected token: from the target, less `share` times the proposal."""
    kind = vectors.load_whole(row.origin)
    if kind == CERTAIN:
        place = row.weights + row.proposed * NUMBER
        left = vectors.load_number(place) - share
        vectors.store_number(place, max(_ZERO, left))
    elif kind == SHORT:
        _take_listed(row, share)
    else:
        take_row(row.weights, row.others, size, share)
    token = draw(row.weights, padded(a.num_columns), row.sums, choose)
    if token == INVALID:
        # Rounding alone can reject a token where nothing is left over but the target itself.
        _target(a, row)
        token = draw(row.weights, padded(a.num_columns), row.sums, choose)
    return token


@compiled
def _is_sum(row: Any) -> Any:
    """Are scores added, and not probabilities?"""
    return vectors.load_number(row.shares) == _ZERO


@compiled
def _target(a: Any, row: Any) -> Any:
    """Fill `weights` with the target, not normalised; returns its mass, 0 if there is none."""
    num_columns = padded(a.num_columns)
    if _is_sum(row):
        largest = _mix(a, row)
        return _probabilities(row, row.weights, num_columns, largest)
    mass = _ZERO
    for model in range(a.num_models):
        if _speaks(row, model):
            largest = _add_model(a, row, model, row.others, True)
            largest = _adjust(a, row, row.others, a.num_columns, a.ids, largest)
            total = _probabilities(row, row.others, num_columns, largest)
            if not total > _ZERO:
                return _ZERO
            share = vectors.load_number(row.shares + model * NUMBER)
            add_row(row.weights, row.others, num_columns, share / total, mass == _ZERO)
            mass += share
    return mass


@compiled
def _mix(a: Any, row: Any) -> Any:
    """Fill `weights` with the sum of scores, adjusted; returns the largest, NEVER for none."""
    largest, is_first = NEVER, True
    for model in range(a.num_models):
        if _speaks(row, model):
            found = _add_model(a, row, model, row.weights, is_first)
            # What is no number stays none.
            largest = found if is_first or largest > NEVER else NEVER
            is_first = False
    if row.reference >= 0 and largest > NEVER:
        largest = _drop_implausible(a, row)
    return _adjust(a, row, row.weights, a.num_columns, a.ids, largest)


@compiled
def _drop_implausible(a: Any, row: Any) -> Any:
    """Of a sum in `weights`; returns the largest that is left, NEVER if there is none."""
    scores = vectors.load_whole(row.scores + row.reference * WHOLE)
    bits = vectors.load_whole(a.bits + row.reference * WHOLE)
    best = add_scores(row.others, scores, bits, _ONE, a.num_columns, True)
    count = row.end_change - row.first_change
    if row.mask != 0 or count > 0:
        if row.mask != 0:
            forbid(row.others, padded(a.num_columns), 0, row.mask)
        changed, changes = _changes(a, row)
        ban(row.others, a.num_columns, 0, changed, changes, count)
        best = largest_of(row.others, padded(a.num_columns))
    return drop_where_less(row.weights, row.others, padded(a.num_columns), best + row.floor)


@compiled
def _adjust(a: Any, row: Any, scores: Any, size: Any, ids: Any, largest: Any) -> Any:
    """Forbid and change some of `size` scores; returns the largest, NEVER if there is none."""
    count = row.end_change - row.first_change
    if (row.mask == 0 and count == 0) or not largest > NEVER:
        return largest
    if row.mask != 0:
        forbid(scores, size if ids else padded(size), ids, row.mask)
    changed, changes = _changes(a, row)
    change(scores, size, ids, changed, changes, count)
    largest = largest_of(scores, padded(size))
    return largest if largest > NOTHING else NEVER


@compiled
def _changes(a: Any, row: Any) -> Any:
    """Addresses of a row's changed tokens, and of what is changed of their scores."""
    return (
        a.changed + row.first_change * WHOLE,
        a.changes + row.first_change * 2 * NUMBER,
    )


@compiled
def _speaks(row: Any, model: Any) -> Any:
    """Has the row scores of this model?"""
    return vectors.load_whole(row.scores + model * WHOLE) != 0


@compiled
def _add_model(a: Any, row: Any, model: Any, target: Any, is_first: Any) -> Any:
    """`add_scores` of a model."""
    scores = vectors.load_whole(row.scores + model * WHOLE)
    scale = vectors.load_number(row.scales + model * NUMBER)
    bits = vectors.load_whole(a.bits + model * WHOLE)
    return add_scores(target, scores, bits, scale, a.num_columns, is_first)


@compiled
def _proposal(a: Any, row: Any, mass: Any) -> Any:
    """Fill `others` with what the token was proposed from, if that is scores.

    Returns what its numbers times make them comparable with weights of this `mass`, 0 if they are
    no distribution; what it so gives to the token; and how many there are, padded.
    """
    kind = vectors.load_whole(row.origin)
    if kind == CERTAIN:
        return mass, mass, 0
    scores = vectors.load_whole(row.origin + WHOLE)
    size, ids, place = a.num_columns, 0, row.proposed
    if kind == SHORT:
        ids = vectors.load_whole(row.origin + 2 * WHOLE)
        size = vectors.load_whole(row.origin + 3 * WHOLE)
        place = column_of(ids, size, row.proposed)
    bits = 16 if kind == NARROW else 32
    largest = add_scores(row.others, scores, bits, row.origin_scale, size, True)
    largest = _adjust(a, row, row.others, size, ids, largest)
    total = _probabilities(row, row.others, padded(size), largest)
    share = mass / total if total > _ZERO else _ZERO
    return share, vectors.load_number(row.others + place * NUMBER) * share, padded(size)


@compiled
def _excess(a: Any, row: Any, mass: Any, p: Any, share: Any, size: Any) -> Any:
    """The sum of what `p` times the target is above the proposal, where it is."""
    kind = vectors.load_whole(row.origin)
    if kind == CERTAIN:
        return p * (_ONE - vectors.load_number(row.weights + row.proposed * NUMBER) / mass)
    if kind == SHORT:
        below = 0.0  # of the target
        ids = vectors.load_whole(row.origin + 2 * WHOLE)
        for number in range(vectors.load_whole(row.origin + 3 * WHOLE)):
            place = row.weights + vectors.load_whole(ids + number * WHOLE) * NUMBER
            given = vectors.load_number(row.others + number * NUMBER) * share
            below += min(p * vectors.load_number(place), given)
        return np.float32(p - below / mass)
    above = 0.0
    for start in range(0, size * NUMBER, BLOCK * NUMBER):
        block_sum = vectors.splat(_ZERO, LANES)
        for column in range(start, start + BLOCK * NUMBER, VECTOR):
            x = vectors.multiply(
                vectors.load(row.weights + column, LANES, 32), vectors.splat(p, LANES)
            )
            y = vectors.multiply(
                vectors.load(row.others + column, LANES, 32), vectors.splat(share, LANES)
            )
            x = vectors.larger(vectors.subtract(x, y), vectors.splat(_ZERO, LANES))
            block_sum = vectors.add(block_sum, x)
        above += vectors.total(block_sum)
    return np.float32(above / mass)


@compiled
def _probabilities(row: Any, scores: Any, size: Any, largest: Any) -> Any:
    """Make them of scores, but for a factor, and truncate them.

    Returns their sum, 0 if there are none.
    """
    total = exponentials(scores, size, largest)
    if row.limits != 0 and total > _ZERO:
        total = truncate(scores, size, total, row.limits, row.gathered)
    return total


@compiled
def _take_listed(row: Any, factor: Any) -> None:
    """`take_row`, of the columns on a shortlist."""
    ids = vectors.load_whole(row.origin + 2 * WHOLE)
    for number in range(vectors.load_whole(row.origin + 3 * WHOLE)):
        place = row.weights + vectors.load_whole(ids + number * WHOLE) * NUMBER
        given = vectors.load_number(row.others + number * NUMBER) * factor
        vectors.store_number(place, max(_ZERO, vectors.load_number(place) - given))
