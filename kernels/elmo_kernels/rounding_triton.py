"""The functions of ``rounding`` for a tile, in Triton: same names, same bytes, on the GPU and in the
interpreter.

Bits, random words and codes are uint32. Kernels that call these are launched with ``enable_fp_fusion=False``.
Constants above 2**31 stand as literals because Triton types them as unsigned by their value.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

import triton
import triton.language as tl

from elmo_kernels import rounding as rd

_GOLDEN, _MIX_1, _MIX_2 = tl.constexpr(rd.GOLDEN), tl.constexpr(rd.MIX_1), tl.constexpr(rd.MIX_2)
_FEATURE_1, _FEATURE_2 = tl.constexpr(rd.FEATURE_1), tl.constexpr(rd.FEATURE_2)
_WEIGHT_1, _WEIGHT_2 = tl.constexpr(rd.WEIGHT_1), tl.constexpr(rd.WEIGHT_2)
_INF, _UNSIGNED = tl.constexpr(rd.FP32_INF), tl.constexpr(0x7FFFFFFF)
_MAX_CODE, _NAN_CODE = tl.constexpr(rd.FP8_MAX_CODE), tl.constexpr(rd.FP8_NAN_CODE)
_REBIAS = tl.constexpr(rd.FP8_REBIAS)
_EVEN_GRID = tl.constexpr(rd.FP8_EVEN_GRID)
_MIN_NORMAL_BITS = tl.constexpr(rd.FP8_MIN_NORMAL_BITS)
_TINY_SCALE, _TINY_MAGIC = tl.constexpr(rd.FP8_TINY_SCALE), tl.constexpr(rd.FP8_TINY_MAGIC)
_TINY_MAGIC_BITS = tl.constexpr((127 + 14) << 23)
_TINY_STEP = tl.constexpr(2.0**-9)
_NAN_BITS = tl.constexpr(rd.FP32_INF | (1 << 22))


@triton.jit
def row_key(stream, label):  # pragma: no cover
    z = stream.to(tl.uint64) + label.to(tl.uint64) * _GOLDEN
    z = (z ^ (z >> 30)) * _MIX_1
    z = (z ^ (z >> 27)) * _MIX_2
    return z ^ (z >> 31)


@triton.jit
def feature_key(feature):  # pragma: no cover
    x = (feature + 1).to(tl.uint32) * _WEIGHT_1
    x = (x ^ (x >> 16)) * _FEATURE_1
    x = (x ^ (x >> 13)) * _FEATURE_2
    return x ^ (x >> 16)


@triton.jit
def weight_bits(key, feature):  # pragma: no cover
    x = feature ^ key.to(tl.uint32)
    x = x * _WEIGHT_1
    x = x ^ (x >> 15)
    x = x + (key >> 32).to(tl.uint32)
    x = x * _WEIGHT_2
    return x ^ (x >> 16)


@triton.jit
def fp32_bits(v):  # pragma: no cover
    return v.to(tl.uint32, bitcast=True)


@triton.jit
def fp32_value(bits):  # pragma: no cover
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def is_finite(v):  # pragma: no cover
    return (fp32_bits(v) & _UNSIGNED) < _INF


@triton.jit
def bf16_value(code):  # pragma: no cover
    return fp32_value(code << 16)


@triton.jit
def bf16_stochastic(v, random):  # pragma: no cover
    bits = fp32_bits(v)
    return tl.where((bits & _UNSIGNED) > _INF, (bits >> 16) | 0x40, (bits + (random >> 16)) >> 16)


@triton.jit
def bf16_nearest(v):  # pragma: no cover
    bits = fp32_bits(v)
    nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where((bits & _UNSIGNED) > _INF, (bits >> 16) | 0x40, nearest)


@triton.jit
def _fp8_finish(bits, code):  # pragma: no cover
    code = tl.where(code > _MAX_CODE, _MAX_CODE, code)
    code = tl.where((bits & _UNSIGNED) > _INF, _NAN_CODE, code)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint32)


@triton.jit
def fp8_stochastic(v, random):  # pragma: no cover
    bits = fp32_bits(v)
    magnitude = bits & _UNSIGNED
    normal = ((magnitude + (random >> 12)) >> 20) - _REBIAS
    small = fp32_value(tl.where(magnitude < _MIN_NORMAL_BITS, magnitude, 0).to(tl.uint32))
    tiny = ((small * _TINY_SCALE).to(tl.int32).to(tl.uint32) + (random >> 12)) >> 20
    return _fp8_finish(bits, tl.where(magnitude < _MIN_NORMAL_BITS, tiny, normal))


@triton.jit
def fp8_nearest(v):  # pragma: no cover
    bits = fp32_bits(v)
    magnitude = bits & _UNSIGNED
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - _REBIAS
    small = fp32_value(tl.where(magnitude < _MIN_NORMAL_BITS, magnitude, 0).to(tl.uint32))
    tiny = fp32_bits(small + _TINY_MAGIC) - _TINY_MAGIC_BITS
    return _fp8_finish(bits, tl.where(magnitude < _MIN_NORMAL_BITS, tiny, normal))


@triton.jit
def fp8_value(code):  # pragma: no cover
    magnitude = code & 0x7F
    normal = tl.where(magnitude == _NAN_CODE, _NAN_BITS, (magnitude + _REBIAS) << 20).to(tl.uint32)
    tiny = fp32_bits(magnitude.to(tl.int32).to(tl.float32) * _TINY_STEP)
    return fp32_value(tl.where(magnitude < 8, tiny, normal) | ((code & 0x80) << 24))


@triton.jit
def fp8_halve(code, random):  # pragma: no cover
    magnitude = code & 0x7F
    on_grid = (magnitude + ((random >> 11) & 1)) >> 1
    return tl.where(magnitude < _EVEN_GRID, on_grid, magnitude - 8) | (code & 0x80)


@triton.jit
def power_of_two(exponent):  # pragma: no cover
    return fp32_value(((exponent + 127) << 23).to(tl.uint32))
