"""Attention over paged KV on a CPU, compiled by Numba.

Imported only where the kernels can run (see `attention_choice`). Keys and values are read where
they lie, page by page, and nothing is gathered. A thread takes neighbouring KV heads of a few
tokens of a span and works through their keys in blocks whose borders depend on the position only:
scores of a block, then its softmax beside what came before (Milakov & Gimelshein 2018, "Online
normalizer calculation for softmax"), then its values. What a query finds is therefore the same to
the last bit, whatever other spans, tokens of its span or threads there are.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import njit
from torch import Tensor

from server.cache.kv_store import KVStore
from server.runner.plan import MAX_GROUPED_TOKENS, Group
from server.runner.style import Style
from server.simd import vectors
from server.simd.functions import exp
from server.simd.kernel import Kernel
from server.simd.vectors import LANES

# Tokens of a span that a thread takes at once.
_CHUNK = 16
# Keys whose scores are kept at once, for every query row of a thread.
_BLOCK = 128
_CACHE_LINE = 64
# What is copied at once, as numbers and in bytes.
_UNIT_LANES = 4
_UNIT = _UNIT_LANES * 4
_NEVER = np.float32(-3e38)
_ZERO, _ONE = np.float32(0.0), np.float32(1.0)
# Of a head: what is worked with stays in registers, or nearly.
_MAX_DIM = 256
# Bytes of the largest working memory of a thread; longer spans are left to torch.
_MAX_SCRATCH = 8 << 20
_BITS = {torch.float32: 32, torch.bfloat16: 16}

_ARGUMENTS = {
    "queries": "q",
    "keys": "q",
    "values": "q",
    "output": "q",
    "scratch": "q",
    "scratch_size": "q",
    "table": "q",
    "table_stride": "q",
    "starts": "q",
    "lengths": "q",
    "num_spans": "q",
    "num_tokens": "q",
    "num_kv_heads": "q",
    "repeats": "q",
    "query_stride": "q",
    "page_size": "q",
    "window": "q",
    "scale": "d",
}


def max_tokens(heads: int, dim: int, element_size: int) -> int:
    """Of a span that is padded: as many as a plan groups, for any heads."""
    return MAX_GROUPED_TOKENS


def supports(group: Group, queries: Tensor, store: KVStore, layer: int, style: Style) -> bool:
    """May `attend_group` be called with this?"""
    keys, values = store.slots(layer)
    rows = min(group.num_tokens, _CHUNK) * queries.shape[1]
    return (
        style.softcap is None
        and style.sinks is None
        and queries.dtype == keys.dtype
        and keys.dtype in _BITS
        and max(keys.shape[-1], values.shape[-1]) <= _MAX_DIM
        and _scratch_bytes(rows, values.shape[-1]) <= _MAX_SCRATCH
    )


def write(store: KVStore, layer: int, slots: Tensor, keys: Tensor, values: Tensor) -> None:
    """As KVStore.write, keys and values in one pass."""
    if not store.has(layer) or not all(
        _is_dense(rows) and rows.dtype == stored.dtype and rows[0].nbytes % _UNIT == 0
        for rows, stored in zip((keys, values), store.slots(layer), strict=True)
    ):
        store.write(layer, slots, keys, values)
        return
    stored_keys, stored_values = store.slots(layer)
    _writer().alone(
        slots.data_ptr(),
        len(slots),
        keys.data_ptr(),
        keys.stride(0) * keys.itemsize,
        stored_keys.data_ptr(),
        stored_keys.stride(0) * keys.itemsize,
        values.data_ptr(),
        values.stride(0) * values.itemsize,
        stored_values.data_ptr(),
        stored_values.stride(0) * values.itemsize,
    )


def _is_dense(rows: Tensor) -> bool:
    """[T, heads, d] with nothing between the heads."""
    return rows.stride()[1:] == (rows.shape[2], 1)


def attend_group(group: Group, queries: Tensor, store: KVStore, layer: int, style: Style) -> Tensor:
    """Queries [B * num_tokens, heads, d] of one group -> [B * num_tokens, heads, value dim].

    The group is one that `supports` accepts.
    """
    keys, values = store.slots(layer)
    num_heads, dim = queries.shape[1:]
    num_kv_heads, value_dim = values.shape[1:]
    if not _is_dense(queries):
        queries = queries.contiguous()
    paging = group.paging()
    size = _scratch_bytes(min(group.num_tokens, _CHUNK) * num_heads, value_dim)
    scratch = torch.empty(torch.get_num_threads() * size, dtype=torch.uint8)
    output = queries.new_empty(len(queries), num_heads, value_dim)
    _kernel(dim, value_dim, _BITS[keys.dtype])(
        queries.data_ptr(),
        keys.data_ptr(),
        values.data_ptr(),
        output.data_ptr(),
        scratch.data_ptr(),
        size,
        paging.table.data_ptr(),
        paging.table.stride(0) * paging.table.itemsize,
        paging.starts.data_ptr(),
        paging.lengths.data_ptr(),
        group.num_spans,
        group.num_tokens,
        num_kv_heads,
        num_heads // num_kv_heads,
        queries.stride(0) * queries.itemsize,
        store.page_size,
        style.window,
        dim**-0.5 if style.scale is None else style.scale,
    )
    return output


def _scratch_bytes(rows: int, value_dim: int) -> int:
    """Working memory of a thread: what `_Task` has addresses of."""
    return _BLOCK * 8 + rows * (_BLOCK + value_dim + 2) * 4


@cache
def _writer() -> Kernel:
    @njit
    def copy(source: Any, target: Any, size: Any) -> None:
        for offset in range(0, size, _UNIT):
            # Whatever the numbers are, their bits are copied.
            vectors.store(target + offset, vectors.load(source + offset, _UNIT_LANES, 32), 32)

    @njit
    def body(a: Any, thread: Any, num_threads: Any) -> None:
        for row in range(a.num_rows):
            slot = vectors.load_whole(a.slots + row * 8)
            copy(a.keys + row * a.key_stride, a.stored_keys + slot * a.key_size, a.key_size)
            copy(
                a.values + row * a.value_stride,
                a.stored_values + slot * a.value_size,
                a.value_size,
            )

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
        num_tokens: at most _CHUNK.
        num_heads: KV heads.
        slots: [_BLOCK] int64, where the keys of the block at hand lie.
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


@njit
def _seen(arguments: Any, task: Any, token: Any) -> Any:
    """The first key that a token's queries see, and the one behind the last.

    Tokens that only pad a span see what its last one sees.
    """
    end = min(task.start + token + 1, task.length)
    return max(0, end - arguments.window) if arguments.window else 0, end


@njit
def _fetch(rows: Any, slots: Any, row_size: Any, num_bytes: Any) -> None:
    """Ask for the first `num_bytes` of LANES rows."""
    for lane in range(LANES):
        row = rows + vectors.load_whole(slots + lane * 8) * row_size
        for line in range(0, num_bytes, _CACHE_LINE):
            vectors.prefetch(row + line)


@njit
def _find_slots(arguments: Any, task: Any, first: Any, count: Any) -> None:
    """Of keys `first` and on; up to a multiple of LANES the last one's is repeated."""
    size = arguments.page_size
    place, offset = task.pages + first // size * 8, first % size
    slot = vectors.load_whole(place) * size + offset
    for key in range((count + LANES - 1) // LANES * LANES):
        vectors.store_whole(task.slots + key * 8, slot)
        if key < count - 1:
            offset, slot = offset + 1, slot + 1
            if offset == size:
                place, offset = place + 8, 0
                slot = vectors.load_whole(place) * size


def _scoring(dim: int, value_dim: int, bits: int) -> Any:
    item = bits // 8

    @njit
    def score(arguments: Any, task: Any, count: Any) -> None:
        """The first `count` keys of the block, and what follows up to a multiple of LANES."""
        row_size = arguments.num_kv_heads * dim * item
        value_size = arguments.num_kv_heads * value_dim * item
        for key in range(0, count, LANES):
            scores, slots = task.scores + key * 4, task.slots + key * 8
            for head in range(task.num_heads):
                keys = task.keys + head * dim * item
                # Processors guess no further than to the end of a page.
                values = task.values + head * value_dim * item
                _fetch(values, slots, value_size, value_dim * item)
                if key + LANES < count:
                    _fetch(keys, slots + LANES * 8, row_size, dim * item)
                for token in range(task.num_tokens):
                    query = task.queries + token * arguments.query_stride
                    query += head * arguments.repeats * dim * item
                    for _ in range(arguments.repeats):
                        x = vectors.load(query, dim, bits)
                        y = vectors.dot_products(x, keys, slots, row_size, bits)
                        vectors.store(scores, y, 32)
                        query += dim * item
                        scores += _BLOCK * 4

    return score


def _weighing_row(value_dim: int) -> Any:
    @njit
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


def _weighing(value_dim: int) -> Any:
    weigh_row = _weighing_row(value_dim)

    @njit
    def weigh(arguments: Any, task: Any, first: Any, count: Any) -> None:
        """Make weights of the scores of keys `first` and on, and the sums so far fit to them."""
        scale = np.float32(arguments.scale)
        width = (count + LANES - 1) // LANES * LANES
        row = 0
        for _ in range(task.num_heads):
            for token in range(task.num_tokens):
                begin, end = _seen(arguments, task, token)
                begin, end = max(begin - first, 0), min(end - first, count)
                for _ in range(arguments.repeats):
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


def _adding(value_dim: int, bits: int) -> Any:
    item = bits // 8

    @njit
    def add_values(arguments: Any, task: Any, first: Any, count: Any) -> None:
        """Of keys `first` and on, by their weights, to the sums."""
        row_size = arguments.num_kv_heads * value_dim * item
        for key in range(0, count, LANES):
            weights, sums, slots = task.scores + key * 4, task.sums, task.slots + key * 8
            for head in range(task.num_heads):
                values = task.values + head * value_dim * item
                for token in range(task.num_tokens):
                    begin, end = _seen(arguments, task, token)
                    begin, end = max(begin - first - key, 0), min(end - first - key, LANES)
                    for _ in range(arguments.repeats):
                        x = vectors.load(sums, value_dim, 32)
                        # Nobody may have written the values behind the last key: they may be NaN.
                        for lane in range(begin, end):
                            weight = vectors.load_number(weights + lane * 4)
                            row = values + vectors.load_whole(slots + lane * 8) * row_size
                            y = vectors.load(row, value_dim, bits)
                            x = vectors.multiply_add(vectors.splat(weight, value_dim), y, x)
                        vectors.store(sums, x, 32)
                        sums += value_dim * 4
                        weights += _BLOCK * 4

    return add_values


def _finishing(value_dim: int, bits: int) -> Any:
    item = bits // 8

    @njit
    def finish(arguments: Any, task: Any) -> None:
        """Divide the sums by the weights: the output."""
        row = 0
        for head in range(task.num_heads):
            for token in range(task.num_tokens):
                place = token * arguments.num_kv_heads + head
                output = task.output + place * arguments.repeats * value_dim * item
                for _ in range(arguments.repeats):
                    weight = vectors.load_number(task.states + row * 8 + 4)
                    share = _ONE / weight if weight > _ZERO else _ZERO  # of no keys: of no text
                    x = vectors.load(task.sums + row * value_dim * 4, value_dim, 32)
                    x = vectors.multiply(x, vectors.splat(share, value_dim))
                    vectors.store(output, x, bits)
                    output += value_dim * item
                    row += 1

    return finish


def _attending(dim: int, value_dim: int, bits: int) -> Any:
    score, weigh = _scoring(dim, value_dim, bits), _weighing(value_dim)
    add_values, finish = _adding(value_dim, bits), _finishing(value_dim, bits)

    @njit
    def attend(arguments: Any, task: Any) -> None:
        for row in range(task.num_heads * task.num_tokens * arguments.repeats):
            vectors.store_number(task.states + row * 8, _NEVER)
            vectors.store_number(task.states + row * 8 + 4, _ZERO)
            vectors.store(task.sums + row * value_dim * 4, vectors.splat(_ZERO, value_dim), 32)
        begin = _seen(arguments, task, 0)[0] // _BLOCK * _BLOCK
        for first in range(begin, task.length, _BLOCK):
            count = min(_BLOCK, task.length - first)
            _find_slots(arguments, task, first, count)
            score(arguments, task, count)
            weigh(arguments, task, first, count)
            add_values(arguments, task, first, count)
        finish(arguments, task)

    return attend


@njit
def _work(arguments: Any, span: Any, token: Any) -> Any:
    """Keys that the tokens of a chunk see, about, for as many tokens as there are."""
    tokens = min(_CHUNK, arguments.num_tokens - token)
    position = vectors.load_whole(arguments.starts + span * 8) + token
    return (position + tokens) * tokens


@cache
def _kernel(dim: int, value_dim: int, bits: int) -> Kernel:
    """Compiled in about a second, once for each kind of model."""
    attend = _attending(dim, value_dim, bits)
    item = bits // 8

    @njit
    def start(arguments: Any, span: Any, token: Any, first: Any, end: Any, scratch: Any) -> None:
        """Attend `_CHUNK` tokens of a span from `token` on, with KV heads first .. end - 1."""
        num_tokens = min(_CHUNK, arguments.num_tokens - token)
        num_heads = end - first
        position = vectors.load_whole(arguments.starts + span * 8) + token
        length = vectors.load_whole(arguments.lengths + span * 8)
        row = span * arguments.num_tokens + token
        width = arguments.num_kv_heads * arguments.repeats * value_dim * item
        rows = num_heads * num_tokens * arguments.repeats
        scores = scratch + _BLOCK * 8
        task = _Task(
            arguments.queries
            + row * arguments.query_stride
            + first * arguments.repeats * dim * item,
            arguments.output + row * width + first * arguments.repeats * value_dim * item,
            arguments.keys + first * dim * item,
            arguments.values + first * value_dim * item,
            arguments.table + span * arguments.table_stride,
            position,
            min(length, position + num_tokens),
            num_tokens,
            num_heads,
            scratch,
            scores,
            scores + rows * _BLOCK * 4,
            scores + rows * (_BLOCK + value_dim) * 4,
        )
        attend(arguments, task)

    @njit
    def body(arguments: Any, thread: Any, num_threads: Any) -> None:
        """The keys of all tokens and KV heads, one after the other, cut evenly between threads."""
        num_heads = arguments.num_kv_heads
        work = 1
        for span in range(arguments.num_spans):
            for token in range(0, arguments.num_tokens, _CHUNK):
                work += _work(arguments, span, token) * num_heads
        done = 0
        scratch = arguments.scratch + thread * arguments.scratch_size
        for span in range(arguments.num_spans):
            for token in range(0, arguments.num_tokens, _CHUNK):
                amount = _work(arguments, span, token)
                # A head belongs to the thread in whose part its middle lies.
                first = end = 0
                for head in range(num_heads):
                    owner = (done + head * amount + amount // 2) * num_threads // work
                    first += owner < thread
                    end += owner <= thread
                done += amount * num_heads
                if first < end:
                    start(arguments, span, token, first, end, scratch)

    return Kernel(body, _ARGUMENTS)
