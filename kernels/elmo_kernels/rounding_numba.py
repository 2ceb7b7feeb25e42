"""The functions of ``rounding`` for one weight, compiled by Numba: same names, same bytes.

Bits, random words and codes are uint32. Without fast-math LLVM neither reorders nor fuses, so FP32 operations
are IEEE.
"""

import numpy as np

from elmo_kernels import rounding as rd
from elmo_kernels.numba_jit import compiled

U32 = np.uint32
U64 = np.uint64
F32 = np.float32

_GOLDEN, _MIX_1, _MIX_2 = U64(rd.GOLDEN), U64(rd.MIX_1), U64(rd.MIX_2)
_WEIGHT_1, _WEIGHT_2 = U32(rd.WEIGHT_1), U32(rd.WEIGHT_2)
_BF16_NAN = U32(rd.BF16_NAN_CODE)
_INF, _UNSIGNED = U32(rd.FP32_INF), U32(0x7FFFFFFF)
_MAX_CODE, _NAN_CODE, _REBIAS = U32(rd.FP8_MAX_CODE), U32(rd.FP8_NAN_CODE), U32(rd.FP8_REBIAS)
_FRACTION, _RANDOM_SHIFT = U32(rd.FP8_FRACTION_BITS), U32(32 - rd.FP8_FRACTION_BITS)
_ROUND_HALF = U32((1 << (rd.FP8_FRACTION_BITS - 1)) - 1)
_MIN_NORMAL_BITS = U32(rd.FP8_MIN_NORMAL_BITS)
_TINY_SCALE, _TINY_MAGIC, _TINY_MAGIC_BITS = F32(rd.FP8_TINY_SCALE), F32(rd.FP8_TINY_MAGIC), U32(rd.FP8_TINY_MAGIC_BITS)
# An FP32 number whose last bit is worth 1: adding it rounds to whole numbers, ties to even.
_WHOLE_MAGIC, _WHOLE_MAGIC_BITS = F32(2.0**23), U32((127 + 23) << 23)
_TINY_STEP = F32(2.0**-9)
_TOP, _MIN_EXPONENT, _MAX_EXPONENT = np.int32(127 + rd.TOP_BINADE), np.int32(rd.MIN_EXPONENT), np.int32(rd.MAX_EXPONENT)


@compiled
def row_key(stream, label):  # pragma: no cover
    z = U64(stream) + U64(label) * _GOLDEN
    z = (z ^ (z >> U64(30))) * _MIX_1
    z = (z ^ (z >> U64(27))) * _MIX_2
    return z ^ (z >> U64(31))


@compiled
def weight_bits(key, feature):  # pragma: no cover
    x = U32(feature ^ U32(key))
    x = U32(x * _WEIGHT_1)
    x = U32(x ^ (x >> U32(15)))
    x = U32(x + U32(key >> U64(32)))
    return U32(x * _WEIGHT_2)


@compiled
def fp32_bits(v):  # pragma: no cover
    return F32(v).view(np.uint32)


@compiled
def fp32_value(bits):  # pragma: no cover
    return U32(bits).view(np.float32)


@compiled
def is_finite(v):  # pragma: no cover
    return (fp32_bits(v) & _UNSIGNED) < _INF


@compiled
def bf16_value(code):  # pragma: no cover
    return fp32_value(U32(code) << U32(16))


@compiled
def bf16_stochastic(v, random):  # pragma: no cover
    bits = fp32_bits(v)
    if (bits & _UNSIGNED) > _INF:
        return _BF16_NAN
    return U32(U32(bits + (random >> U32(16))) >> U32(16))


@compiled
def bf16_nearest(v):  # pragma: no cover
    bits = fp32_bits(v)
    if (bits & _UNSIGNED) > _INF:
        return _BF16_NAN
    return U32(U32(bits + U32(0x7FFF) + ((bits >> U32(16)) & U32(1))) >> U32(16))


@compiled
def _fp8_finish(bits, normal, tiny):  # pragma: no cover
    code = min(tiny if (bits & _UNSIGNED) < _MIN_NORMAL_BITS else normal, _MAX_CODE)
    code = _NAN_CODE if (bits & _UNSIGNED) > _INF else code
    return U32(code | ((bits >> U32(24)) & U32(0x80)))


@compiled
def _fp8_tiny(bits):  # pragma: no cover
    magnitude = bits & _UNSIGNED
    return fp32_value(magnitude if magnitude < _MIN_NORMAL_BITS else U32(0))


@compiled
def fp8_stochastic(v, random):  # pragma: no cover
    bits = fp32_bits(v)
    random = U32(random >> _RANDOM_SHIFT)
    normal = U32((bits & _UNSIGNED) - (_REBIAS << _FRACTION))
    tiny = U32(fp32_bits(_fp8_tiny(bits) * _TINY_SCALE + _WHOLE_MAGIC) - _WHOLE_MAGIC_BITS)
    return _fp8_finish(bits, U32(U32(normal + random) >> _FRACTION), U32(U32(tiny + random) >> _FRACTION))


@compiled
def fp8_nearest(v):  # pragma: no cover
    bits = fp32_bits(v)
    magnitude = bits & _UNSIGNED
    normal = U32(U32(U32(magnitude + _ROUND_HALF + ((magnitude >> _FRACTION) & U32(1))) >> _FRACTION) - _REBIAS)
    tiny = U32(fp32_bits(_fp8_tiny(bits) + _TINY_MAGIC) - _TINY_MAGIC_BITS)
    return _fp8_finish(bits, normal, tiny)


@compiled
def fp8_value(code):  # pragma: no cover
    magnitude = U32(code & U32(0x7F))
    sign = U32(U32(code & U32(0x80)) << U32(24))
    normal = U32(U32(magnitude + _REBIAS) << U32(20))
    if magnitude < U32(8):
        normal = fp32_bits(F32(np.int32(magnitude)) * _TINY_STEP)
    if magnitude == _NAN_CODE:
        normal = U32(0x7FC00000)
    return fp32_value(normal | sign)


@compiled
def fp8_exponent(largest_bits):  # pragma: no cover
    return min(max(np.int32(largest_bits >> U32(23)) - _TOP, _MIN_EXPONENT), _MAX_EXPONENT)


@compiled
def power_of_two(exponent):  # pragma: no cover
    return fp32_value(U32(np.int32(exponent) + np.int32(127)) << U32(23))
