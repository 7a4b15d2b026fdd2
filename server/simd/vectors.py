"""Vectors of float32 numbers as values of compiled code: `Vector(lanes)`.

Numba compiles loops over arrays and leaves it to LLVM to find out that their turns are
independent, which it seldom finds where there is a page table between. A Vector says so: it is one
value of LLVM's vector type, of any length; LLVM cuts it into what the machine's registers hold.
Operations take two vectors of as many lanes, memory is named by its address, and what a function
needs to know when it is compiled (lanes, bits) is given as a constant.

Sums are taken in an order that depends on the number of lanes only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

# Lanes of what a row of many vectors is worked through with.
LANES = 16
WHOLE, NUMBER = 8, 4  # bytes of an int64 and of a float32; see `load_whole`, `load_number`

FLOAT = ir.FloatType()
I1, I8, I16, I32, I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
# Sums may be reordered, products and sums fused; of infinities and NaN nothing is promised.
FAST = ("fast",)
_FLOAT_BIAS, _FLOAT_SHIFT = 127, 23  # of the exponent of a float32 number
_HALF_SHIFT = 16  # bfloat16 is the upper half of a float32 number

Emit = Callable[..., Any]


class Vector(types.Type):  # type: ignore[misc]
    """The type of `lanes` float32 numbers."""

    def __init__(self, lanes: int) -> None:
        self.lanes = lanes
        super().__init__(f"Vector({lanes})")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, vector: Vector) -> None:
        super().__init__(manager, vector, ir.VectorType(FLOAT, vector.lanes))


def _of_two(emit: Emit) -> Any:
    """An operation of two vectors."""

    @intrinsic
    def operation(context: Any, x: Any, y: Any) -> Any:
        return x(x, y), lambda context, builder, signature, args: emit(builder, *args)

    return operation


add = _of_two(lambda builder, x, y: builder.fadd(x, y, flags=FAST))
subtract = _of_two(lambda builder, x, y: builder.fsub(x, y, flags=FAST))
multiply = _of_two(lambda builder, x, y: builder.fmul(x, y, flags=FAST))
divide = _of_two(lambda builder, x, y: builder.fdiv(x, y, flags=FAST))
larger = _of_two(
    lambda builder, x, y: builder.select(builder.fcmp_ordered(">", x, y, flags=FAST), x, y)
)
smaller = _of_two(
    lambda builder, x, y: builder.select(builder.fcmp_ordered("<", x, y, flags=FAST), x, y)
)


product = _of_two(lambda builder, x, y: builder.fmul(x, y))
product.__doc__ = "As `multiply`, and of infinities and NaN what they are."


@intrinsic
def where_less(context: Any, x: Any, y: Any, yes: Any, no: Any) -> Any:
    """`yes` in lanes where x < y, else `no`; NaN is less than nothing."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        x, y, yes, no = args
        return builder.select(builder.fcmp_ordered("<", x, y), yes, no)

    return x(x, y, yes, no), generate


@intrinsic
def where_bits(context: Any, address: Any, yes: Any, no: Any) -> Any:
    """`yes` in lanes whose bit is set, else `no`; that of lane i is bit i % 8 of byte i // 8."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        bits = builder.load(pointer(builder, args[0], ir.IntType(no.lanes)), align=1)
        return builder.select(builder.bitcast(bits, ir.VectorType(I1, no.lanes)), args[1], args[2])

    return no(types.int64, yes, no), generate


@intrinsic
def is_set(context: Any, address: Any, number: Any) -> Any:
    """Of bits from `address` on, that of `number`; see `where_bits`."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        address, number = args
        place = builder.add(address, builder.lshr(number, ir.Constant(I64, 3)))
        byte = builder.load(pointer(builder, place, I8), align=1)
        shift = builder.trunc(builder.and_(number, ir.Constant(I64, 7)), I8)
        return builder.trunc(builder.lshr(byte, shift), I1)

    return types.boolean(types.int64, types.int64), generate


@intrinsic
def multiply_add(context: Any, x: Any, y: Any, z: Any) -> Any:
    """X * y + z, rounded once."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return call(builder, f"llvm.fma.v{x.lanes}f32", args[0].type, args)

    return x(x, y, z), generate


@intrinsic
def floor(context: Any, x: Any) -> Any:
    """The whole number below, lane by lane."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return call(builder, f"llvm.floor.v{x.lanes}f32", args[0].type, args)

    return x(x), generate


@intrinsic
def exponent(context: Any, x: Any) -> Any:
    """The whole number below the binary logarithm of numbers above 0."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        whole = ir.VectorType(I32, x.lanes)
        bits = builder.lshr(builder.bitcast(args[0], whole), same(whole, _FLOAT_SHIFT))
        return builder.sitofp(builder.sub(bits, same(whole, _FLOAT_BIAS)), args[0].type)

    return x(x), generate


@intrinsic
def power_of_two(context: Any, x: Any) -> Any:
    """2 ** x of whole numbers from -126 to 127."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        whole = ir.VectorType(I32, x.lanes)
        exponent = builder.add(builder.fptosi(args[0], whole), same(whole, _FLOAT_BIAS))
        return builder.bitcast(builder.shl(exponent, same(whole, _FLOAT_SHIFT)), args[0].type)

    return x(x), generate


@intrinsic
def total(context: Any, x: Any) -> Any:
    """The sum of all lanes, float32."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        name = f"llvm.vector.reduce.fadd.v{x.lanes}f32"
        return call(builder, name, FLOAT, [ir.Constant(FLOAT, 0.0), *args], fastmath=FAST)

    return types.float32(x), generate


@intrinsic
def largest(context: Any, x: Any) -> Any:
    """The largest of all lanes, float32."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        name = f"llvm.vector.reduce.fmax.v{x.lanes}f32"
        return call(builder, name, FLOAT, args, fastmath=FAST)

    return types.float32(x), generate


@intrinsic(prefer_literal=True)
def splat(context: Any, number: Any, lanes: Any) -> Any:
    """`number` in each of `lanes`."""
    count = lanes.literal_value

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return everywhere(builder, args[0], count)

    return Vector(count)(types.float32, lanes), generate


@intrinsic(prefer_literal=True)
def load(context: Any, address: Any, lanes: Any, bits: Any) -> Any:
    """`lanes` numbers from `address` on; `bits` of each: 32 for float32, 16 for bfloat16."""
    count, width = lanes.literal_value, bits.literal_value

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return load_vector(builder, args[0], count, width)

    return Vector(count)(types.int64, lanes, bits), generate


@intrinsic(prefer_literal=True)
def load_half(context: Any, address: Any, lanes: Any) -> Any:
    """`lanes` float16 numbers from `address` on."""
    count = lanes.literal_value

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.VectorType(ir.HalfType(), count)
        halves = builder.load(pointer(builder, args[0], kind), align=2)
        return builder.fpext(halves, ir.VectorType(FLOAT, count))

    return Vector(count)(types.int64, lanes), generate


@intrinsic(prefer_literal=True)
def store(context: Any, address: Any, x: Any, bits: Any) -> Any:
    """Write `x` from `address` on, as float32 or rounded to bfloat16; see `load`."""
    width = bits.literal_value

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        numbers = args[1] if width == 32 else _rounded(builder, args[1], x.lanes)
        builder.store(numbers, pointer(builder, args[0], numbers.type), align=width // 8)
        return context.get_dummy_value()

    return types.void(types.int64, x, bits), generate


@intrinsic
def load_number(context: Any, address: Any) -> Any:
    """The float32 number at `address`."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load(pointer(builder, args[0], FLOAT), align=4)

    return types.float32(types.int64), generate


@intrinsic
def store_number(context: Any, address: Any, number: Any) -> Any:
    """Write a float32 number at `address`."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store(args[1], pointer(builder, args[0], FLOAT), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.float32), generate


@intrinsic
def load_whole(context: Any, address: Any) -> Any:
    """The int64 number at `address`."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load(pointer(builder, args[0], I64), align=8)

    return types.int64(types.int64), generate


@intrinsic
def of_bits(context: Any, bits: Any) -> Any:
    """The float32 number of 32 bits."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(builder.trunc(args[0], I32), FLOAT)

    return types.float32(types.int64), generate


@intrinsic
def prefetch(context: Any, address: Any) -> Any:
    """Ask for the cache line of `address`, which need not be anybody's."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        ask_for(builder, args[0])
        return context.get_dummy_value()

    return types.void(types.int64), generate


@intrinsic
def store_whole(context: Any, address: Any, number: Any) -> Any:
    """Write an int64 number at `address`."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store(args[1], pointer(builder, args[0], I64), align=8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


def load_vector(builder: Any, address: Any, count: int, width: int) -> Any:
    """See `load`."""
    if width == 32:
        return builder.load(pointer(builder, address, ir.VectorType(FLOAT, count)), align=4)
    halves = builder.load(pointer(builder, address, ir.VectorType(I16, count)), align=2)
    whole = ir.VectorType(I32, count)
    bits = builder.shl(builder.zext(halves, whole), same(whole, _HALF_SHIFT))
    return builder.bitcast(bits, ir.VectorType(FLOAT, count))


def _rounded(builder: Any, x: Any, count: int) -> Any:
    """To bfloat16, to the nearest, ties to even."""
    whole = ir.VectorType(I32, count)
    bits = builder.bitcast(x, whole)
    is_odd = builder.and_(builder.lshr(bits, same(whole, _HALF_SHIFT)), same(whole, 1))
    bits = builder.add(builder.add(bits, same(whole, (1 << _HALF_SHIFT - 1) - 1)), is_odd)
    return builder.trunc(builder.lshr(bits, same(whole, _HALF_SHIFT)), ir.VectorType(I16, count))


def pointer(builder: Any, address: Any, pointee: Any) -> Any:
    """`address` as that of a `pointee`."""
    return builder.inttoptr(address, pointee.as_pointer())


def same(vector: Any, number: float) -> Any:
    """A constant of the type `vector`, the number in all lanes."""
    return ir.Constant(vector, [number] * vector.count)


def everywhere(builder: Any, number: Any, count: int) -> Any:
    """`number` in each of `count` lanes."""
    single = ir.VectorType(number.type, 1)
    first = builder.insert_element(ir.Constant(single, ir.Undefined), number, ir.Constant(I32, 0))
    return shuffle(builder, first, first, [0] * count)


def ask_for(builder: Any, address: Any) -> None:
    """The cache line of `address`: to read, soon again, data."""
    options = [ir.Constant(I32, number) for number in (0, 3, 1)]
    place = pointer(builder, address, I8)
    call(builder, "llvm.prefetch.p0", ir.VoidType(), [place, *options])


def shuffle(builder: Any, x: Any, y: Any, lanes: Any) -> Any:
    """Some `lanes` of `x` and, counted on from its last, of `y`."""
    numbers = list(lanes)
    return builder.shuffle_vector(x, y, ir.Constant(ir.VectorType(I32, len(numbers)), numbers))


def call(builder: Any, name: str, returned: Any, args: Any, **options: Any) -> Any:
    """One of LLVM's own functions."""
    kind = ir.FunctionType(returned, [arg.type for arg in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), args, **options)
