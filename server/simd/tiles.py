"""Products of a few rows with a weight that is laid out in blocks of LANES outputs.

A tile is all that some rows and one or two blocks make together: its sums stay in registers while
the weight streams past, 64 bytes at a step. Every sum runs over its inputs in an order that is the
same in all tiles, so that a row's products are the same to the last bit whatever
rows stand beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from server.simd.vectors import (
    FAST,
    FLOAT,
    I32,
    I64,
    LANES,
    ask_for,
    call,
    everywhere,
    pointer,
    same,
)

# Bytes of a block that a step takes: a cache line.
STEP = 64
# How far ahead of its use the weight is asked for: processors guess no further than to the end of
# a page of 4 KB, and the way from memory takes as long as some dozens of steps.
_AHEAD = 8192


class _BFloat(ir.types.Type):  # type: ignore[misc]
    """LLVM's bfloat, which llvmlite has no name for."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


_SUMS = ir.VectorType(FLOAT, LANES)
_HALVES = ir.VectorType(ir.HalfType(), LANES)
_PAIRS = ir.VectorType(_BFloat(), 2 * LANES)
_WORDS = ir.VectorType(I32, LANES)


@dataclass(frozen=True, slots=True)
class Format:
    """Of a weight, and of the rows that it is multiplied with.

    Attributes:
        weight: the type of its numbers.
        row_bytes: of a row's number.
    """

    weight: str
    row_bytes: int

    @property
    def inputs(self) -> int:
        """Of a step."""
        return {"float32": 1, "float16": 2, "bfloat16": 2}[self.weight]


FLOAT32 = Format("float32", 4)  # float32 rows
FLOAT16 = Format("float16", 4)  # float32 rows
BFLOAT16 = Format("bfloat16", 2)  # bfloat16 rows; products and sums in float32


@cache
def tile(form: Format, num_rows: int, num_blocks: int) -> Any:
    """Compiled code of `num_rows` times LANES sums, for neighbouring blocks.

    Few rows take several blocks: a sum waits for its last product, and others are made meanwhile.

    It takes, in this order: the address of the first row and the bytes from one to the next; the
    number of the last row there is, which stands for those behind it; the address of the first
    block, and the steps of each; where float32 sums go, and the bytes from one row of them to the
    next; and what they are multiplied by.
    """

    @intrinsic
    def multiply(
        context: Any,
        x: Any,
        x_stride: Any,
        last: Any,
        block: Any,
        num_steps: Any,
        output: Any,
        output_stride: Any,
        scale: Any,
    ) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            x, x_stride, last, block, num_steps, output, output_stride, scale = args
            rows = [_least(builder, number, last) for number in range(num_rows)]
            inputs = [builder.add(x, builder.mul(row, x_stride)) for row in rows]
            size = builder.mul(num_steps, ir.Constant(I64, STEP))
            blocks = [
                builder.add(block, builder.mul(size, ir.Constant(I64, number)))
                for number in range(num_blocks)
            ]
            # LLVM keeps them in registers.
            sums = [[cgutils.alloca_once(builder, _SUMS) for _ in blocks] for _ in rows]
            for place in (place for places in sums for place in places):
                builder.store(same(_SUMS, 0.0), place)
            with cgutils.for_range(builder, num_steps) as loop:
                _step(builder, form, loop.index, inputs, blocks, sums)
            factor = everywhere(builder, scale, LANES)
            for row, places in zip(rows, sums, strict=True):
                first = builder.add(output, builder.mul(row, output_stride))
                for number, place in enumerate(places):
                    target = builder.add(first, ir.Constant(I64, number * LANES * 4))
                    result = builder.fmul(builder.load(place), factor)
                    builder.store(result, pointer(builder, target, _SUMS), align=4)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 7, types.float32), generate

    return multiply


def _step(
    builder: Any,
    form: Format,
    step: Any,
    inputs: list[Any],
    blocks: list[Any],
    sums: list[list[Any]],
) -> None:
    """STEP bytes of each block, times as many numbers of every row."""
    weights = []
    for block in blocks:
        place = builder.add(block, builder.mul(step, ir.Constant(I64, STEP)))
        ask_for(builder, builder.add(place, ir.Constant(I64, _AHEAD)))
        weights.append(_weights(builder, form, place))
    size = form.inputs * form.row_bytes
    for row, places in zip(inputs, sums, strict=True):
        address = builder.add(row, builder.mul(step, ir.Constant(I64, size)))
        numbers = _numbers(builder, form, address)
        for weight, place in zip(weights, places, strict=True):
            total = builder.load(place)
            for number, part in zip(numbers, weight, strict=True):
                total = _multiplied(builder, form, total, number, part)
            builder.store(total, place)


def _weights(builder: Any, form: Format, place: Any) -> list[Any]:
    """Of LANES outputs, for one multiplication after another."""
    if form is FLOAT32:
        return [builder.load(pointer(builder, place, _SUMS), align=4)]
    if form is BFLOAT16:
        words = builder.load(pointer(builder, place, _WORDS), align=4)
        return [builder.bitcast(words, _PAIRS)]
    halves = [builder.add(place, ir.Constant(I64, start)) for start in (0, STEP // 2)]
    return [
        builder.fpext(builder.load(pointer(builder, half, _HALVES), align=2), _SUMS)
        for half in halves
    ]


def _numbers(builder: Any, form: Format, address: Any) -> list[Any]:
    """Of a row, in all lanes, for one multiplication after another."""
    if form is BFLOAT16:
        pair = builder.load(pointer(builder, address, I32), align=2)
        return [builder.bitcast(everywhere(builder, pair, LANES), _PAIRS)]
    places = [builder.add(address, ir.Constant(I64, 4 * i)) for i in range(form.inputs)]
    return [
        everywhere(builder, builder.load(pointer(builder, place, FLOAT), align=4), LANES)
        for place in places
    ]


def _multiplied(builder: Any, form: Format, total: Any, number: Any, weights: Any) -> Any:
    if form is BFLOAT16:
        name = "llvm.x86.avx512bf16.dpbf16ps.512"
        return call(builder, name, _SUMS, [total, number, weights])
    return call(builder, f"llvm.fma.v{LANES}f32", _SUMS, [number, weights, total], fastmath=FAST)


def _least(builder: Any, number: int, last: Any) -> Any:
    constant = ir.Constant(I64, number)
    return builder.select(builder.icmp_signed("<", constant, last), constant, last)
