"""Linear layers over weights laid out for the CPU's kernels; see `server.simd.tiles`.

oneDNN and FBGEMM read a weight that comes from memory slower than memory gives it, and what they
sum depends on how many rows there are. These do neither; `python -m server.bench.linear` compares
them.
"""

from __future__ import annotations

import time
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from server.simd import vectors
from server.simd.compiled import compiled
from server.simd.kernel import Kernel, part
from server.simd.program import Later, Program
from server.simd.tiles import BFLOAT16, FLOAT16, FLOAT32, STEP, Format, tile
from server.simd.vectors import LANES

_FORMATS = {torch.float32: FLOAT32, torch.float16: FLOAT16, torch.bfloat16: BFLOAT16}
_ROW_TYPES = {FLOAT32: torch.float32, FLOAT16: torch.float32, BFLOAT16: torch.bfloat16}
# Bytes of rows that a block finds where the one before it left them.
_CACHED = 384 << 10
# Rows of a tile of two blocks, whose sums and factors fill the registers; and of one block.
_PAIR_ROWS, _SINGLE_ROWS = 12, 16
_WHOLE_TILES = 48  # rows, of either kind
# With no more rows blocks are taken one by one: they wait for memory, faster in one stream.
_FEW_ROWS = 8
_ANY_NUMBER = 1 << 40
_TIMED_CALLS, _TIMED_ROUNDS = 4, 12
_ARGUMENTS = {
    "x": "q",
    "x_stride": "q",
    "num_rows": "q",
    "weight": "q",
    "num_steps": "q",
    "num_blocks": "q",
    "output": "q",
    "output_stride": "q",
    "most_single": "q",
    "scale": "d",
}


class SimdLinear(nn.Module):
    """`x @ weight.T + bias`, summed in float32.

    float32 and float16 weights are multiplied with float32 numbers, nothing is rounded but sums;
    bfloat16 weights with bfloat16 numbers.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, exponent: int = 0) -> None:
        """`weight` [out_features, in_features] is copied, times 2 ** exponent if it is float16."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self._form = _FORMATS[weight.dtype]
        assert supports(weight), "an odd number of inputs"
        self._scale = 2.0**-exponent
        missing = -self.out_features % LANES
        blocks = nn.functional.pad(weight.detach(), (0, 0, 0, missing))
        count = self._form.inputs if self._form is BFLOAT16 else 1
        blocks = blocks.view(-1, LANES, self.in_features // count, count)
        # No parameter: transformers takes a model's dtype from the first of them.
        self.packed = blocks.permute(0, 2, 1, 3).contiguous()
        self._bias = None if bias is None else bias.detach().float().contiguous()

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features] of the same type."""
        output = self.product(x.reshape(-1, x.shape[-1])).to(x.dtype)
        return output.view(*x.shape[:-1], self.out_features)

    def product(self, x: Tensor) -> Tensor:
        """[T, in_features] of any type -> float32 [T, out_features]."""
        x = x.to(_ROW_TYPES[self._form]).contiguous()
        num_blocks = len(self.packed)
        output = torch.empty(len(x), num_blocks * LANES)
        if len(x):
            _kernel(self._form)(
                x.data_ptr(),
                x.shape[1] * x.itemsize,  # the stride of a single row may be any number
                len(x),
                self.packed.data_ptr(),
                x.shape[1] // self._form.inputs,
                num_blocks,
                output.data_ptr(),
                output.stride(0) * output.itemsize,
                _most_single(self._form),
                self._scale,
            )
        if output.shape[1] != self.out_features:
            output = output[:, : self.out_features].contiguous()
        return output if self._bias is None else output.add_(self._bias)

    @property
    def is_full(self) -> bool:
        """Do its outputs fill their blocks? A program has no others."""
        return self.out_features % LANES == 0

    def add_to(self, program: Program, x: Later, num_rows: Later, output: Later) -> None:
        """`product` as a part of `program`, with dense rows of the type that it multiplies.

        The layer `is_full`.
        """
        program.add(
            _kernel(self._form),
            x=x,
            x_stride=self.in_features * self._form.row_bytes,
            num_rows=num_rows,
            weight=self.packed.data_ptr(),
            num_steps=self.in_features // self._form.inputs,
            num_blocks=len(self.packed),
            output=output,
            output_stride=self.out_features * 4,
            most_single=_most_single(self._form),
            scale=self._scale,
        )
        if self._bias is not None:
            program.add(
                _adding_bias(),
                x=output,
                bias=self._bias.data_ptr(),
                num_rows=num_rows,
                size=self.out_features,
            )


def supports(weight: Tensor) -> bool:
    """Can it be laid out? Steps take two inputs of a 16-bit weight."""
    return weight.shape[1] % _FORMATS[weight.dtype].inputs == 0


def _tile(form: Format, num_rows: int, num_blocks: int) -> Any:
    """Code for `num_rows` rows from `row` on, or as many as there are, and some blocks."""
    multiply = tile(form, num_rows, num_blocks)

    @compiled
    def run(a: Any, row: Any, block: Any) -> None:
        multiply(
            a.x + row * a.x_stride,
            a.x_stride,
            min(a.num_rows - row, num_rows) - 1,
            a.weight + block * a.num_steps * STEP,
            a.num_steps,
            a.output + row * a.output_stride + block * LANES * 4,
            a.output_stride,
            np.float32(a.scale),
        )

    return run


def _rows_of(form: Format, num_blocks: int) -> Any:
    """Code for rows from `start` to before `stop`, and some blocks."""
    rows_1, rows_2, rows_4, rows_6, rows_8, rows_12 = (
        _tile(form, count, num_blocks) for count in (1, 2, 4, 6, 8, _PAIR_ROWS)
    )
    rows_16 = _tile(form, _SINGLE_ROWS, 1)

    @compiled
    def run(a: Any, start: Any, stop: Any, block: Any) -> None:
        row = start
        while row < stop:
            left = stop - row
            # Of two blocks only where one to four rows would be left over.
            if left > _PAIR_ROWS and (num_blocks == 1 or left <= _SINGLE_ROWS):
                for number in range(num_blocks):
                    rows_16(a, row, block + number)
                row += _SINGLE_ROWS
                continue
            if left > 8:
                rows_12(a, row, block)
            elif left > 6:
                rows_8(a, row, block)
            elif left > 4:
                rows_6(a, row, block)
            elif left > 2:
                rows_4(a, row, block)
            elif left > 1:
                rows_2(a, row, block)
            else:
                rows_1(a, row, block)
            row += _PAIR_ROWS

    return run


@cache
def _kernel(form: Format) -> Kernel:
    """Compiled in some seconds, once for each format."""
    one, together = _rows_of(form, 1), _rows_of(form, 2)

    @compiled
    def body(a: Any, thread: Any, num_threads: Any) -> None:
        """Rows that fit into the cache, with some blocks after the others."""
        first = a.num_blocks * thread // num_threads
        end = a.num_blocks * (thread + 1) // num_threads
        last = end - (end - first) % 2
        cached = _CACHED // a.x_stride
        whole = _WHOLE_TILES if cached >= _WHOLE_TILES else _PAIR_ROWS
        at_once = max(_PAIR_ROWS, cached - cached % whole)
        for start in range(0, a.num_rows, at_once):
            stop = min(start + at_once, a.num_rows)
            done = first
            if stop - start > a.most_single:
                done = last
                for block in range(first, last, 2):
                    together(a, start, stop, block)
            for block in range(done, end):
                one(a, start, stop, block)

    return Kernel(body, _ARGUMENTS)


@cache
def _most_single(form: Format) -> int:
    """Rows up to which blocks are taken one by one here: few of them, or any number.

    Two blocks ask less of the caches, and keep fewer rows' sums: which is faster differs by
    processor. Timed once, in some milliseconds; what comes out is the same to the last bit.
    """
    rows, inputs, outputs = _WHOLE_TILES, 512, 2 * LANES  # all of it stays in a core's cache
    weight = torch.full((outputs // LANES, inputs // form.inputs, STEP), 0, dtype=torch.uint8)
    x = torch.zeros(rows, inputs * form.row_bytes, dtype=torch.uint8)
    output = torch.empty(rows, outputs)
    kernel = _kernel(form)

    def seconds(most_single: int) -> float:
        arguments = kernel.in_order(
            x=x.data_ptr(),
            x_stride=x.stride(0),
            num_rows=rows,
            weight=weight.data_ptr(),
            num_steps=inputs // form.inputs,
            num_blocks=outputs // LANES,
            output=output.data_ptr(),
            output_stride=output.stride(0) * output.itemsize,
            most_single=most_single,
            scale=1.0,
        )
        started = time.perf_counter()
        for _ in range(_TIMED_CALLS):
            kernel.alone(*arguments)
        return time.perf_counter() - started

    pairs, singles = (
        min(seconds(most) for _ in range(_TIMED_ROUNDS)) for most in (_FEW_ROWS, _ANY_NUMBER)
    )
    return _ANY_NUMBER if singles < pairs else _FEW_ROWS


@cache
def _adding_bias() -> Kernel:
    @compiled
    def body(a: Any, thread: Any, num_threads: Any) -> None:
        first, end = part(a.num_rows, thread, num_threads)
        for row in range(first, end):
            for place in range(0, a.size * 4, LANES * 4):
                x = a.x + row * a.size * 4 + place
                y = vectors.load(a.bias + place, LANES, 32)
                vectors.store(x, vectors.add(vectors.load(x, LANES, 32), y), 32)

    return Kernel(body, {"x": "q", "bias": "q", "num_rows": "q", "size": "q"})
