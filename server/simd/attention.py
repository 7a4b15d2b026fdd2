"""Attention over paged KV on a CPU.

Keys and values are read where they lie, page by page, and nothing is gathered. A thread takes
neighbouring KV heads of a few tokens of a span and works through their keys in blocks whose borders
depend on the position only: scores of a block, then its softmax beside what came before (Milakov &
Gimelshein 2018, "Online normalizer calculation for softmax"), then its values. What a query finds
is therefore the same to the last bit, whatever other spans, tokens of its span or threads there
are.

    attending            the kernel: the keys of all spans, cut evenly between threads
      _starting          some KV heads of a chunk of a span, as a _Task
        _attending       block by block:
          _find_slots      where its keys lie
          _scoring         queries times keys
          _weighing        the softmax beside what came before
          _adding          values by their weights
          _finishing       and behind the last: divide by the sum of the weights
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np

from server.simd import rows, vectors
from server.simd.compiled import compiled
from server.simd.functions import copy, exp
from server.simd.kernel import Kernel, part
from server.simd.vectors import LANES, WHOLE

# Tokens of a span that a thread takes at once.
CHUNK = 16
# Keys whose scores are kept at once, for every query row of a thread.
_BLOCK = 128
_CACHE_LINE = 64
_NEVER = np.float32(-3e38)
_ZERO, _ONE = np.float32(0.0), np.float32(1.0)

_ARGUMENTS = {
    "queries": "q",
    "keys": "q",
    "values": "q",
    "output": "q",
    "scratch": "q",
    "scratch_size": "q",
    "groups": "q",
    "num_groups": "q",
    "num_kv_heads": "q",
    "query_stride": "q",
    "page_size": "q",
    "window": "q",
    "scale": "d",
}


def scratch_bytes(num_tokens: int, num_heads: int, value_dim: int) -> int:
    """Working memory of a thread, for spans of at most so many tokens: what `_Task` points to."""
    num_rows = min(num_tokens, CHUNK) * num_heads
    return 2 * _BLOCK * WHOLE + num_rows * (_BLOCK + value_dim + 2) * 4


@cache
def writer() -> Kernel:
    """Of keys and values, into the store; a thread takes its `part` of the rows."""

    @compiled
    def body(a: Any, thread: Any, num_threads: Any) -> None:
        first, end = part(a.num_rows, thread, num_threads)
        for row in range(first, end):
            slot = vectors.load_whole(a.slots + row * 8)
            key, value = a.keys + row * a.key_stride, a.values + row * a.value_stride
            copy(key, a.stored_keys + slot * a.key_size, a.key_size)
            copy(value, a.stored_values + slot * a.value_size, a.value_size)

    names = (
        "slots",
        "num_rows",
        "keys",
        "key_stride",
        "stored_keys",
        "key_size",
        "values",
        "value_stride",
        "stored_values",
        "value_size",
    )
    return Kernel(body, dict.fromkeys(names, "q"))


class Kind(NamedTuple):
    """What a kernel is compiled for.

    Attributes:
        dim, value_dim: of a head's keys, and values.
        repeats: query heads of a KV head.
        bits: of a number; see `vectors.load`.
    """

    dim: int
    value_dim: int
    repeats: int
    bits: int


class _Group(NamedTuple):
    """A Group, as the kernel reads it.

    Attributes:
        first_row: among queries and output.
        table, table_stride, starts, lengths: see Paging; addresses, and bytes of a row.
        num_spans, num_tokens: of each span.
    """

    first_row: Any
    table: Any
    table_stride: Any
    starts: Any
    lengths: Any
    num_spans: Any
    num_tokens: Any


_GROUP_SIZE = len(_Group._fields) * WHOLE


class _Task(NamedTuple):
    """What one thread does of one span: some neighbouring KV heads.

    A row is a query: of a KV head, a token and one of the heads that share the KV head, in this
    order. Addresses count bytes.

    Attributes:
        queries, output: of the first token and the first of the heads.
        keys, values: of slot 0 and the first of the heads.
        pages: int64 numbers of the span's pages.
        start: position of the first token.
        length: of the sequence, up to the last of the tokens.
        num_tokens: at most CHUNK.
        num_heads: KV heads.
        slots: [2 * _BLOCK] int64, where the keys of the block at hand and of the next one lie.
        scores: [rows, _BLOCK] of that block.
        sums: [rows, value_dim] values so far, weighted.
        states: [rows, 2] the largest score so far, and the sum of the weights.
    """

    queries: Any
    output: Any
    keys: Any
    values: Any
    pages: Any
    start: Any
    length: Any
    num_tokens: Any
    num_heads: Any
    slots: Any
    scores: Any
    sums: Any
    states: Any


@compiled
def _seen(arguments: Any, task: Any, token: Any) -> Any:
    """The first key that a token's queries see, and the one behind the last.

    Tokens that only pad a span see what its last one sees.
    """
    end = min(task.start + token + 1, task.length)
    return max(0, end - arguments.window) if arguments.window else 0, end


@compiled
def _fetch(rows: Any, slots: Any, row_size: Any, num_bytes: Any) -> None:
    """Ask for the first `num_bytes` of LANES rows: processors guess no further than a page."""
    for lane in range(LANES):
        row = rows + vectors.load_whole(slots + lane * WHOLE) * row_size
        for line in range(0, num_bytes, _CACHE_LINE):
            vectors.prefetch(row + line)


@compiled
def _find_slots(arguments: Any, task: Any, first: Any, count: Any) -> None:
    """Of keys `first` and on; up to a multiple of LANES the last one's is repeated."""
    size = arguments.page_size
    place, offset = task.pages + first // size * WHOLE, first % size
    slot = vectors.load_whole(place) * size + offset
    for key in range((count + LANES - 1) // LANES * LANES):
        vectors.store_whole(task.slots + key * WHOLE, slot)
        if key < count - 1:
            offset, slot = offset + 1, slot + 1
            if offset == size:
                place, offset = place + WHOLE, 0
                slot = vectors.load_whole(place) * size


def _scoring(kind: Kind) -> Any:
    dim, value_dim, item = kind.dim, kind.value_dim, kind.bits // 8
    score_rows = rows.scoring(kind.repeats, dim, kind.bits)
    query_size = kind.repeats * dim * item
    width = kind.repeats * _BLOCK * 4

    @compiled
    def score(arguments: Any, task: Any, count: Any) -> None:
        """The first `count` keys of the block, and what follows up to a multiple of LANES."""
        row_size = arguments.num_kv_heads * dim * item
        value_size = arguments.num_kv_heads * value_dim * item
        for key in range(0, count, LANES):
            scores, slots = task.scores + key * 4, task.slots + key * WHOLE
            _fetch(task.values, slots, value_size, task.num_heads * value_dim * item)
            for head in range(task.num_heads):
                keys = task.keys + head * dim * item
                for token in range(task.num_tokens):
                    queries = task.queries + token * arguments.query_stride + head * query_size
                    score_rows(queries, keys, row_size, slots, scores, _BLOCK * 4)
                    scores += width

    return score


def _weighing_row(value_dim: int) -> Any:
    @compiled
    def weigh_row(scores: Any, width: Any, scale: Any, state: Any, sums: Any) -> None:
        most = vectors.load(scores, LANES, 32)
        for key in range(LANES, width, LANES):
            most = vectors.larger(most, vectors.load(scores + key * 4, LANES, 32))
        before = vectors.load_number(state)
        most_of_all = max(before, vectors.largest(most) * scale)
        shift, factor = vectors.splat(most_of_all, LANES), vectors.splat(scale, LANES)
        weights = vectors.splat(_ZERO, LANES)
        for key in range(0, width, LANES):
            x = vectors.multiply(vectors.load(scores + key * 4, LANES, 32), factor)
            weight = exp(vectors.subtract(x, shift))
            vectors.store(scores + key * 4, weight, 32)
            weights = vectors.add(weights, weight)
        faded = vectors.total(exp(vectors.splat(before - most_of_all, LANES))) / LANES
        weight_before = vectors.load_number(state + 4)
        vectors.store_number(state, most_of_all)
        vectors.store_number(state + 4, weight_before * faded + vectors.total(weights))
        if faded != _ONE:
            x = vectors.load(sums, value_dim, 32)
            vectors.store(sums, vectors.multiply(x, vectors.splat(faded, value_dim)), 32)

    return weigh_row


def _weighing(kind: Kind) -> Any:
    repeats, value_dim = kind.repeats, kind.value_dim
    weigh_row = _weighing_row(value_dim)

    @compiled
    def weigh(arguments: Any, task: Any, first: Any, count: Any) -> None:
        """Make weights of the scores of keys `first` and on, and the sums so far fit to them."""
        scale = np.float32(arguments.scale)
        width = (count + LANES - 1) // LANES * LANES
        row = 0
        for _ in range(task.num_heads):
            for token in range(task.num_tokens):
                begin, end = _seen(arguments, task, token)
                begin, end = max(begin - first, 0), min(end - first, count)
                for _ in range(repeats):
                    if begin < end:
                        scores = task.scores + row * _BLOCK * 4
                        for key in range(begin):
                            vectors.store_number(scores + key * 4, _NEVER)
                        for key in range(end, width):
                            vectors.store_number(scores + key * 4, _NEVER)
                        sums = task.sums + row * value_dim * 4
                        weigh_row(scores, width, scale, task.states + row * 8, sums)
                    row += 1

    return weigh


def _adding(kind: Kind) -> Any:
    dim, value_dim, item = kind.dim, kind.value_dim, kind.bits // 8
    add_rows = rows.adding(kind.repeats, value_dim, kind.bits)
    width = kind.repeats * _BLOCK * 4
    sums_size = kind.repeats * value_dim * 4

    @compiled
    def add_values(arguments: Any, task: Any, first: Any, count: Any, count_next: Any) -> None:
        """Of keys `first` and on, by their weights, to the sums; ask for the next block's keys."""
        key_size = arguments.num_kv_heads * dim * item
        row_size = arguments.num_kv_heads * value_dim * item
        for key in range(0, count, LANES):
            weights, sums, slots = task.scores + key * 4, task.sums, task.slots + key * WHOLE
            if key < count_next:
                next_slots = slots + _BLOCK * WHOLE
                _fetch(task.keys, next_slots, key_size, task.num_heads * dim * item)
            for head in range(task.num_heads):
                values = task.values + head * value_dim * item
                for token in range(task.num_tokens):
                    begin, end = _seen(arguments, task, token)
                    begin, end = max(begin - first - key, 0), min(end - first - key, LANES)
                    # Nobody may have written the values behind the last key: they may be NaN.
                    add_rows(weights, _BLOCK * 4, begin, end, values, row_size, slots, sums)
                    sums += sums_size
                    weights += width

    return add_values


def _finishing(kind: Kind) -> Any:
    value_dim, repeats, bits, item = kind.value_dim, kind.repeats, kind.bits, kind.bits // 8

    @compiled
    def finish(arguments: Any, task: Any) -> None:
        """Divide the sums by the weights: the output."""
        row = 0
        for head in range(task.num_heads):
            for token in range(task.num_tokens):
                place = token * arguments.num_kv_heads + head
                output = task.output + place * repeats * value_dim * item
                for _ in range(repeats):
                    weight = vectors.load_number(task.states + row * 8 + 4)
                    share = _ONE / weight if weight > _ZERO else _ZERO  # of no keys: of no text
                    x = vectors.load(task.sums + row * value_dim * 4, value_dim, 32)
                    x = vectors.multiply(x, vectors.splat(share, value_dim))
                    vectors.store(output, x, bits)
                    output += value_dim * item
                    row += 1

    return finish


def _attending(kind: Kind) -> Any:
    score, weigh = _scoring(kind), _weighing(kind)
    add_values, finish = _adding(kind), _finishing(kind)
    dim, value_dim, item = kind.dim, kind.value_dim, kind.bits // 8
    repeats = kind.repeats

    @compiled
    def attend(arguments: Any, task: Any) -> None:
        for row in range(task.num_heads * task.num_tokens * repeats):
            vectors.store_number(task.states + row * 8, _NEVER)
            vectors.store_number(task.states + row * 8 + 4, _ZERO)
            vectors.store(task.sums + row * value_dim * 4, vectors.splat(_ZERO, value_dim), 32)
        begin = _seen(arguments, task, 0)[0] // _BLOCK * _BLOCK
        for first in range(begin, task.length, _BLOCK):
            count = min(_BLOCK, task.length - first)
            count_next = min(_BLOCK, task.length - first - count)
            _find_slots(arguments, task, first, count + count_next)
            if first == begin:
                row_size = arguments.num_kv_heads * dim * item
                for key in range(0, count, LANES):
                    slots = task.slots + key * WHOLE
                    _fetch(task.keys, slots, row_size, task.num_heads * dim * item)
            score(arguments, task, count)
            weigh(arguments, task, first, count)
            add_values(arguments, task, first, count, count_next)
        finish(arguments, task)

    return attend


@compiled
def _group_at(place: Any) -> Any:
    return _Group(
        vectors.load_whole(place),
        vectors.load_whole(place + WHOLE),
        vectors.load_whole(place + 2 * WHOLE),
        vectors.load_whole(place + 3 * WHOLE),
        vectors.load_whole(place + 4 * WHOLE),
        vectors.load_whole(place + 5 * WHOLE),
        vectors.load_whole(place + 6 * WHOLE),
    )


@compiled
def _work(group: Any, span: Any, token: Any) -> Any:
    """Keys that the tokens of a chunk see, about, for as many tokens as there are."""
    tokens = min(CHUNK, group.num_tokens - token)
    position = vectors.load_whole(group.starts + span * WHOLE) + token
    return (position + tokens) * tokens


def _starting(kind: Kind) -> Any:
    attend = _attending(kind)
    dim, value_dim, item = kind.dim, kind.value_dim, kind.bits // 8
    repeats = kind.repeats

    @compiled
    def start(
        arguments: Any, group: Any, span: Any, token: Any, first: Any, end: Any, scratch: Any
    ) -> None:
        """Attend `CHUNK` tokens of a span from `token` on, with KV heads first .. end - 1."""
        num_tokens = min(CHUNK, group.num_tokens - token)
        num_heads = end - first
        position = vectors.load_whole(group.starts + span * WHOLE) + token
        length = vectors.load_whole(group.lengths + span * WHOLE)
        row = group.first_row + span * group.num_tokens + token
        width = arguments.num_kv_heads * repeats * value_dim * item
        num_rows = num_heads * num_tokens * repeats
        scores = scratch + 2 * _BLOCK * WHOLE
        task = _Task(
            arguments.queries + row * arguments.query_stride + first * repeats * dim * item,
            arguments.output + row * width + first * repeats * value_dim * item,
            arguments.keys + first * dim * item,
            arguments.values + first * value_dim * item,
            group.table + span * group.table_stride,
            position,
            min(length, position + num_tokens),
            num_tokens,
            num_heads,
            scratch,
            scores,
            scores + num_rows * _BLOCK * 4,
            scores + num_rows * (_BLOCK + value_dim) * 4,
        )
        attend(arguments, task)

    return start


@cache
def attending(kind: Kind) -> Kernel:
    """Compiled in about two seconds."""
    start = _starting(kind)

    @compiled
    def attend_group(a: Any, group: Any, thread: Any, num_threads: Any) -> None:
        """The keys of all tokens and KV heads, one after the other, cut evenly between threads."""
        num_heads = a.num_kv_heads
        work = 1
        for span in range(group.num_spans):
            for token in range(0, group.num_tokens, CHUNK):
                work += _work(group, span, token) * num_heads
        done = 0
        scratch = a.scratch + thread * a.scratch_size
        for span in range(group.num_spans):
            for token in range(0, group.num_tokens, CHUNK):
                amount = _work(group, span, token)
                # A head belongs to the thread in whose part its middle lies.
                first = end = 0
                for head in range(num_heads):
                    owner = (done + head * amount + amount // 2) * num_threads // work
                    first += owner < thread
                    end += owner <= thread
                done += amount * num_heads
                if first < end:
                    start(a, group, span, token, first, end, scratch)

    @compiled
    def body(a: Any, thread: Any, num_threads: Any) -> None:
        for number in range(a.num_groups):
            group = _group_at(a.groups + number * _GROUP_SIZE)
            attend_group(a, group, thread, num_threads)

    return Kernel(body, _ARGUMENTS)
