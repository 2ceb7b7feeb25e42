"""What the Triton kernels share: tiles of weights and of operands, and their products.

Weights are read and written as integers (bf16 as int16 patterns, fp8 as uint8 codes). The first row of a tile
has a 64-bit offset, since a chunk may hold more than 2**31 weights; inside a tile offsets are 32-bit. ``EVEN``
says that every tile lies inside its tensor, so that nothing is masked. ``DOT_FP32`` keeps FP32 operands in
matrix products: for the fp32 format, and in the interpreter, whose bfloat16 arithmetic is wrong. Loops have
compile-time bounds, which every supported interpreter can run.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

import triton
import triton.language as tl

from elmo_kernels import rounding_triton as rt
from elmo_kernels import types

GROUP = tl.constexpr(types.GROUP_FEATURES)


@triton.jit
def load(place, inside, EVEN: tl.constexpr):  # pragma: no cover
    """0 outside."""
    return tl.load(place) if EVEN else tl.load(place, mask=inside, other=0)


@triton.jit
def store(place, value, inside, EVEN: tl.constexpr):  # pragma: no cover
    if EVEN:
        tl.store(place, value)
    else:
        tl.store(place, value, mask=inside)


@triton.jit
def dealt(tile, ROWS: tl.constexpr, TILE_D: tl.constexpr):  # pragma: no cover
    """The columns of a tile in the order 0 1 q q+1 2q 2q+1 3q 3q+1 2 3 q+2 ..., where q is a quarter of them.

    In a product of the tensor cores a thread holds two neighbouring columns of every eight. Of dealt columns
    these are neighbouring features, so a thread reads and writes its weights by whole vectors.
    """
    return tl.reshape(tl.permute(tl.reshape(tile, (ROWS, 4, TILE_D // 8, 2)), (0, 2, 1, 3)), (ROWS, TILE_D))


@triton.jit
def undealt(tile, ROWS: tl.constexpr, TILE_D: tl.constexpr):  # pragma: no cover
    """A tile whose columns are ``dealt`` in the order of the features."""
    return tl.reshape(tl.permute(tl.reshape(tile, (ROWS, TILE_D // 8, 4, 2)), (0, 2, 1, 3)), (ROWS, TILE_D))


@triton.jit
def exponent_place(exponent_ptr, row, first_col, D: tl.constexpr):  # pragma: no cover
    """Where the exponents of a group of features of some rows are."""
    return exponent_ptr + row * ((D + GROUP - 1) // GROUP) + first_col // GROUP


@triton.jit
def operand_tile(
    x_ptr, instance, inside, first_col, D: tl.constexpr, TILE_D: tl.constexpr, EVEN: tl.constexpr
):  # pragma: no cover
    """x_BD of some instances and features; 0 outside."""
    col = first_col + tl.arange(0, TILE_D)
    return load(x_ptr + instance[:, None] * D + col[None, :], inside[:, None] & (col < D)[None, :], EVEN)


@triton.jit
def weights(
    data_ptr, exponent_ptr, row, inside_row, first_col, D: tl.constexpr, FMT: tl.constexpr, TILE_L: tl.constexpr,
    TILE_D: tl.constexpr, EVEN: tl.constexpr, DEALT: tl.constexpr = False,
):  # pragma: no cover  # fmt: skip
    """FP32 weights of a tile of one group of features; 0 outside."""
    col = first_col + tl.arange(0, TILE_D)
    raw = load(data_ptr + row[:, None] * D + col[None, :], inside_row[:, None] & (col < D)[None, :], EVEN)
    if DEALT:
        raw = dealt(raw, TILE_L, TILE_D)
    if FMT == "fp8":
        exponent = load(exponent_place(exponent_ptr, row, first_col, D), inside_row, EVEN).to(tl.int32)
        value = rt.fp8_placed(raw) * rt.power_of_two(exponent - rt.FP8_SHIFT)[:, None]
    elif FMT == "bf16":
        value = bf16_pattern_value(raw)
    else:
        value = raw
    return value


@triton.jit
def bf16_pattern_value(raw):  # pragma: no cover
    """FP32 values of int16 patterns."""
    return rt.bf16_value(raw.to(tl.uint16, bitcast=True).to(tl.uint32))


@triton.jit
def bf16_pattern(code):  # pragma: no cover
    """The int16 pattern of a bf16 code."""
    return code.to(tl.uint16).to(tl.int16, bitcast=True)


@triton.jit
def dot(a, b, total, DOT_FP32: tl.constexpr):  # pragma: no cover
    """``total + a b`` with FP32 accumulation."""
    if DOT_FP32:
        total = tl.dot(a, b, total, input_precision="ieee")
    else:
        total = tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16), total)
    return total


@triton.jit
def fp8_dot(a, b, DOT_FP32: tl.constexpr):  # pragma: no cover
    """``a b`` of E4M3 codes with FP32 accumulation."""
    if DOT_FP32:
        scale: tl.constexpr = 2.0**-rt.FP8_SHIFT
        total = tl.dot(rt.fp8_placed(a) * scale, rt.fp8_placed(b) * scale, input_precision="ieee")
    else:
        total = tl.dot(a.to(tl.float8e4nv, bitcast=True), b.to(tl.float8e4nv, bitcast=True))
    return total
