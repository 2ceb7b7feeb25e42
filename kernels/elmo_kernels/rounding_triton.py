"""The functions of ``rounding`` for a tile, in Triton: same bytes, on the GPU and in the interpreter.

Bits, random words and codes are uint32. Kernels that call these are launched with ``enable_fp_fusion=False``,
and FP32 subnormals are never flushed: E4M3 is handled at ``2**FP8_SHIFT`` times its value, where its fields
stand in the places of FP32's.

A tile holds no NaN and nothing that saturates when it is rounded: its kernel tests the largest magnitude once a
tile and mends the tile first (``mend_*``), so that a weight costs no test.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

import triton
import triton.language as tl

from elmo_kernels import rounding as rd

_GOLDEN, _MIX_1, _MIX_2 = tl.constexpr(rd.GOLDEN), tl.constexpr(rd.MIX_1), tl.constexpr(rd.MIX_2)
_FEATURE_1, _FEATURE_2 = tl.constexpr(rd.FEATURE_1), tl.constexpr(rd.FEATURE_2)
_WEIGHT_1, _WEIGHT_2 = tl.constexpr(rd.WEIGHT_1), tl.constexpr(rd.WEIGHT_2)
_MAGNITUDE = tl.constexpr(0x7FFFFFFF)
_NAN_BITS = tl.constexpr(rd.BF16_NAN_CODE << 16)
_FRACTION = tl.constexpr(rd.FP8_FRACTION_BITS)
_FRACTION_DROPPED = tl.constexpr(32 - rd.FP8_FRACTION_BITS)
_SHIFT_SCALE, _MIN_NORMAL_BITS = tl.constexpr(2.0**rd.FP8_SHIFT), tl.constexpr(rd.FP8_MIN_NORMAL_BITS)
_TINY_MAGIC, _TINY_MAGIC_BITS = tl.constexpr(rd.FP8_TINY_MAGIC), tl.constexpr(rd.FP8_TINY_MAGIC_BITS)
_HALF_LESS_ONE = tl.constexpr((1 << (rd.FP8_FRACTION_BITS - 1)) - 1)
_FP8_FIELDS = tl.constexpr(rd.FP32_SIGN | (0x7F << rd.FP8_FRACTION_BITS))
_MIN_EXPONENT, _MAX_EXPONENT = tl.constexpr(rd.MIN_EXPONENT), tl.constexpr(rd.MAX_EXPONENT)
_TOP = tl.constexpr(127 + rd.TOP_BINADE)
_LARGEST = tl.constexpr(rd.FP8_MAX * 2.0**rd.MAX_EXPONENT)
INF_BITS = tl.constexpr(rd.FP32_INF)
LARGEST_BITS = tl.constexpr(((127 + 8 + rd.MAX_EXPONENT) << 23) | (6 << rd.FP8_FRACTION_BITS))
"""The largest magnitude that fp8 holds, at the largest exponent."""
FP8_SHIFT = tl.constexpr(rd.FP8_SHIFT)


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
    return x * _WEIGHT_2


@triton.jit
def fp32_bits(v):  # pragma: no cover
    return v.to(tl.uint32, bitcast=True)


@triton.jit
def fp32_value(bits):  # pragma: no cover
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def magnitude_bits(v):  # pragma: no cover
    """The pattern of ``|v|`` as int32: magnitudes compare as these do, and NaN is above infinity."""
    return v.to(tl.int32, bitcast=True) & _MAGNITUDE


@triton.jit
def is_finite(v):  # pragma: no cover
    return magnitude_bits(v) < INF_BITS


@triton.jit
def bf16_value(code):  # pragma: no cover
    return fp32_value(code << 16)


@triton.jit
def mend_bf16(v):  # pragma: no cover
    """The one NaN that is written for every NaN."""
    return tl.where(magnitude_bits(v) > INF_BITS, fp32_value(tl.full(v.shape, _NAN_BITS, tl.uint32)), v)


@triton.jit
def bf16_stochastic(v, random):  # pragma: no cover
    return (fp32_bits(v) + (random >> 16)) >> 16


@triton.jit
def bf16_nearest(v):  # pragma: no cover
    bits = fp32_bits(v)
    return (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16


@triton.jit
def mend_fp8(v):  # pragma: no cover
    """What saturates, at the largest magnitude that fp8 holds."""
    return tl.minimum(tl.maximum(v, -_LARGEST), _LARGEST)


@triton.jit
def fp8_exponent(largest):  # pragma: no cover
    """The exponent, int32, of groups whose largest ``magnitude_bits`` are given."""
    return tl.minimum(tl.maximum((largest >> 23) - _TOP, _MIN_EXPONENT), _MAX_EXPONENT)


@triton.jit
def fp8_stochastic(shifted, random):  # pragma: no cover
    """Sign and code in the places of FP32's fields, of values times ``2**FP8_SHIFT``; lower bits are left over."""
    return fp32_bits(shifted) + (random >> _FRACTION_DROPPED)


@triton.jit
def fp8_nearest(v):  # pragma: no cover
    """As ``fp8_stochastic``, but of the values themselves, ties to even."""
    bits = fp32_bits(v * _SHIFT_SCALE)
    normal = bits + _HALF_LESS_ONE + ((bits >> _FRACTION) & 1)
    tiny = ((fp32_bits(tl.abs(v) + _TINY_MAGIC) - _TINY_MAGIC_BITS) << _FRACTION) | (bits & 0x80000000)
    return tl.where(magnitude_bits(v) < _MIN_NORMAL_BITS, tiny, normal)


@triton.jit
def fp8_code(placed, ON_GPU: tl.constexpr):  # pragma: no cover
    """uint8 codes of signs and codes in the places of FP32's fields: bit 27 is 0, so four bits up is the code.

    ``ON_GPU`` packs the upper bytes of four words by three instructions; the compiler takes seven.
    """
    code = (placed << 4) | (placed & 0x80000000)
    if ON_GPU:
        code = tl.inline_asm_elementwise(
            "{.reg .b32 low, high; prmt.b32 low, $1, $2, 0x73; prmt.b32 high, $3, $4, 0x73;"
            " prmt.b32 $0, low, high, 0x5410;}",
            "=r,r,r,r,r", [code], tl.uint8, is_pure=True, pack=4,
        )  # fmt: skip
    else:
        code = (code >> 24).to(tl.uint8)
    return code


@triton.jit
def fp8_placed(code):  # pragma: no cover
    """A code in the places of FP32's fields: a float32 that is ``2**FP8_SHIFT`` times its value."""
    return fp32_value(((code.to(tl.int32) << 24) >> 4).to(tl.uint32, bitcast=True) & _FP8_FIELDS)


@triton.jit
def fp8_kept(placed):  # pragma: no cover
    """``2**FP8_SHIFT`` times the value whose sign and code are given in the places of FP32's fields."""
    return fp32_value(placed & _FP8_FIELDS)


@triton.jit
def power_of_two(exponent):  # pragma: no cover
    return fp32_value(((exponent + 127) << 23).to(tl.uint32, bitcast=True))
