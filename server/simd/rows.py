"""What attention does with some query rows and the rows of a table: scores, and weighted sums.

Rows of the table are found by their numbers. Each is loaded once for all queries, and every sum is
taken in an order that depends on the length of a row only.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from server.simd.vectors import (
    FAST,
    FLOAT,
    I64,
    LANES,
    WHOLE,
    call,
    everywhere,
    load_vector,
    pointer,
    same,
    shuffle,
)

_REGISTERS = 16  # of LANES numbers, for queries or their sums: half of what AVX-512 has


@cache
def scoring(count: int, length: int, bits: int) -> Any:
    """Compiled code of the products of `count` queries with LANES rows, `length` numbers each.

    It takes, in this order: the address of the queries, side by side; that of row 0, the bytes of
    a row, and the address of LANES int64 numbers of rows; and where float32 [LANES] go for the
    first query, and the bytes from there to where they go for the next.
    """
    item = bits // 8

    @intrinsic
    def score(
        context: Any,
        queries: Any,
        table: Any,
        row_size: Any,
        numbers: Any,
        output: Any,
        output_stride: Any,
    ) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            queries, table, row_size, numbers, output, output_stride = args

            def sums(parts: list[list[Any]], first: int, step: int) -> list[Any]:
                """Of rows first .. first + step - 1, as lanes that are to be added up.

                Half by half, so that few wait to be merged: registers are few.
                """
                if step == 1:
                    row = _row(builder, table, row_size, numbers, first)
                    return _products(builder, parts, _parts(builder, row, length, bits))
                half = step // 2
                halves = sums(parts, first, half), sums(parts, first + half, half)
                return [_merged(builder, *pair, half) for pair in zip(*halves, strict=True)]

            for together in _together(count, length):
                starts = [builder.add(queries, _whole(n * length * item)) for n in together]
                parts = [_parts(builder, start, length, bits) for start in starts]
                for number, total in zip(together, sums(parts, 0, LANES), strict=True):
                    place = builder.add(output, builder.mul(_whole(number), output_stride))
                    builder.store(total, pointer(builder, place, total.type), align=4)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 6), generate

    return score


@cache
def adding(count: int, length: int, bits: int) -> Any:
    """Compiled code that adds weighted rows, `length` numbers each, to `count` float32 sums.

    It takes, in this order: the address of the first weight of the first sum, float32, and the
    bytes from there to that of the next; which of the weights come first and last but one; the
    address of row 0, the bytes of a row, and the address of the int64 numbers of rows, one for
    each weight; and where the sums are, side by side.
    """

    @intrinsic
    def weigh(
        context: Any,
        weights: Any,
        weights_stride: Any,
        begin: Any,
        end: Any,
        table: Any,
        row_size: Any,
        numbers: Any,
        sums: Any,
    ) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            weights, weights_stride, begin, end, table, row_size, numbers, sums = args
            kind = ir.VectorType(FLOAT, length)
            for together in _together(count, length):
                places = [builder.add(sums, _whole(number * length * 4)) for number in together]
                totals = [cgutils.alloca_once(builder, kind) for _ in together]
                for place, total in zip(places, totals, strict=True):
                    builder.store(builder.load(pointer(builder, place, kind), align=4), total)
                firsts = [
                    builder.add(weights, builder.mul(_whole(number), weights_stride))
                    for number in together
                ]
                with cgutils.for_range(builder, end, start=begin) as loop:
                    row = _row(builder, table, row_size, numbers, loop.index)
                    x = load_vector(builder, row, length, bits)
                    for first, total in zip(firsts, totals, strict=True):
                        place = builder.add(first, builder.mul(loop.index, _whole(4)))
                        weight = builder.load(pointer(builder, place, FLOAT), align=4)
                        args = [everywhere(builder, weight, length), x, builder.load(total)]
                        builder.store(call(builder, f"llvm.fma.v{length}f32", kind, args), total)
                for place, total in zip(places, totals, strict=True):
                    builder.store(builder.load(total), pointer(builder, place, kind), align=4)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 8), generate

    return weigh


def _together(count: int, length: int) -> list[range]:
    """Queries in parts that are worked with at once: as many as registers hold."""
    most = max(1, _REGISTERS // -(-length // LANES))
    return [range(first, min(first + most, count)) for first in range(0, count, most)]


def _whole(number: int) -> Any:
    return ir.Constant(I64, number)


def _row(builder: Any, table: Any, row_size: Any, numbers: Any, index: Any) -> Any:
    """The address of the row that the number at `index` names."""
    place = _whole(index) if isinstance(index, int) else index
    place = builder.add(numbers, builder.mul(place, _whole(WHOLE)))
    number = builder.load(pointer(builder, place, I64), align=WHOLE)
    return builder.add(table, builder.mul(number, row_size))


def _parts(builder: Any, address: Any, length: int, bits: int) -> list[Any]:
    """Numbers of a row as vectors of LANES, the last filled up with zeros."""
    parts = []
    for start in range(0, length, LANES):
        count = min(LANES, length - start)
        place = builder.add(address, _whole(start * bits // 8))
        x = load_vector(builder, place, count, bits)
        if count < LANES:
            kept = [*range(count), *[count] * (LANES - count)]
            x = shuffle(builder, x, same(x.type, 0.0), kept)
        parts.append(x)
    return parts


def _products(builder: Any, queries: list[list[Any]], row: list[Any]) -> list[Any]:
    """Of each query with the row, LANES sums each."""
    found = []
    for query in queries:
        total = None
        for x, y in zip(query, row, strict=True):
            if total is None:
                total = builder.fmul(x, y, flags=FAST)
            else:
                total = call(builder, f"llvm.fma.v{LANES}f32", x.type, [x, y, total])
        found.append(total)
    return found


def _merged(builder: Any, x: Any, y: Any, step: int) -> Any:
    """Sums of lanes i and i ^ step: of `x` where i has not the bit `step`, of `y` where it has."""
    lanes = range(LANES)
    kept = [i if not i & step else LANES + i for i in lanes]
    other = [i ^ step if not i & step else LANES + (i ^ step) for i in lanes]
    return builder.fadd(shuffle(builder, x, y, kept), shuffle(builder, x, y, other), flags=FAST)
