"""Rounding and random bits, defined on integers: the torch twin, which is the specification.

``rounding_numba`` and ``rounding_triton`` hold the same functions under the same names and give the same
bytes. FP32 values enter as their bit patterns; a weight leaves as its code. No framework cast is trusted with
it.

Codes: bf16 is the upper half of the FP32 pattern. FP8 is E4M3 (OCP OFP8, finite + NaN): sign, 4 exponent bits
of bias 7, 3 mantissa bits; 0x7F is NaN, 0x7E is 448; magnitudes below 2**-6 lie on an even grid of step 2**-9.
"""

import torch
from torch import Tensor

MASK_32 = 0xFFFFFFFF
MASK_64 = 0xFFFFFFFFFFFFFFFF
FP32_INF = 0x7F800000
FP32_SIGN = 0x80000000

BF16_NAN_CODE = 0x7FC0
"""The one NaN that is written: hardware differs in the payloads it propagates."""

FP8_MAX = 448.0
FP8_MAX_CODE = 0x7E
FP8_NAN_CODE = 0x7F
FP8_MIN_NORMAL_BITS = (127 - 6) << 23
FP8_REBIAS = (127 - 7) << 3
FP8_FRACTION_BITS = 20
FP8_TINY_SCALE = 2.0**29
"""Steps of 2**-9 as fixed point with 20 fractional bits."""
FP8_TINY_MAGIC, FP8_TINY_MAGIC_BITS = 2.0**14, (127 + 14) << 23
"""An FP32 number whose last bit is worth 2**-9: adding it rounds to that grid, ties to even."""
FP8_SHIFT = -120
"""E4M3 times 2**-120 is FP32 with its exponent field, its subnormals included, in the same places."""
TOP_BINADE = 7
"""The largest magnitude of a group lies in [2**7, 2**8) times its scale: rounding up never leaves E4M3."""
MIN_EXPONENT, MAX_EXPONENT = -100, 6
"""With these ``2**(exponent - FP8_SHIFT)`` and ``2**(FP8_SHIFT - exponent)`` are normal FP32 numbers."""

# Increment and multipliers of SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators,
# 2014, section 5).
GOLDEN = 0x9E3779B97F4A7C15
MIX_1 = 0xBF58476D1CE4E5B9
MIX_2 = 0x94D049BB133111EB
# Multipliers of the finalizer of MurmurHash3 (Appleby, 2011), which mixes a feature index.
FEATURE_1 = 0x85EBCA6B
FEATURE_2 = 0xC2B2AE35
# Odd multipliers of the hash of one weight, held to account by tests/kernels/test_random_bits.py.
WEIGHT_1 = 0x9E3779B1
WEIGHT_2 = 0x85EBCA6B


def _signed(value: int) -> int:
    """A 64-bit pattern as the Python integer that torch.int64 holds."""
    value &= MASK_64
    return value - (1 << 64) if value >> 63 else value


def stream_key(seed: int, step: int) -> int:
    """One signed 64-bit key of a run's seed and step, both taken modulo 2**64. Host side, once a call."""
    key = seed & MASK_64
    for word in (0, step):
        key = (key + (word & MASK_64) * MIX_2 + GOLDEN) & MASK_64
        key = ((key ^ (key >> 30)) * MIX_1) & MASK_64
        key = ((key ^ (key >> 27)) * MIX_2) & MASK_64
        key ^= key >> 31
    return _signed(key)


def row_key(stream: int, label_L: Tensor) -> Tensor:
    """The 64-bit key, int64, of each label id under a stream: SplitMix64 at the label's position."""
    z = stream + label_L * _signed(GOLDEN)
    z = (z ^ ((z >> 30) & (MASK_64 >> 30))) * _signed(MIX_1)
    z = (z ^ ((z >> 27) & (MASK_64 >> 27))) * _signed(MIX_2)
    return z ^ ((z >> 31) & (MASK_64 >> 31))


def feature_key(feature_D: Tensor) -> Tensor:
    """A mixed 32-bit key, int64, of each feature index below 2**32.

    Made once a feature, not once a weight: neighbours then differ in many bits before the short hash of a
    weight begins.
    """
    x = ((feature_D + 1) * WEIGHT_1) & MASK_32
    x = ((x ^ (x >> 16)) * FEATURE_1) & MASK_32
    x = ((x ^ (x >> 13)) * FEATURE_2) & MASK_32
    return x ^ (x >> 16)


def weight_bits(row_key_L1: Tensor, feature_key_D: Tensor) -> Tensor:
    """32 bits, int64 in [0, 2**32), from the keys of row and feature, in 6 operations on 32 bits.

    The upper 20 bits are random, and rounding uses them from the top; the lower ones of a product are not.
    """
    x = (feature_key_D ^ row_key_L1) & MASK_32
    x = (x * WEIGHT_1) & MASK_32
    x = x ^ (x >> 15)
    x = (x + (row_key_L1 >> 32)) & MASK_32
    return (x * WEIGHT_2) & MASK_32


def random_bits(seed: int, step: int, label_L: Tensor, feature_D: Tensor) -> Tensor:
    """Random bits of weights, a pure function of seed, step, label id and feature index.

    Args:
        seed, step: integers, taken modulo 2**64.
        label_L: int64 label ids. feature_D: int64 feature indices below 2**32.

    Returns:
        int64 of shape (L, D) in [0, 2**32).
    """
    return weight_bits(row_key(stream_key(seed, step), label_L)[:, None], feature_key(feature_D))


def fp32_bits(v: Tensor) -> Tensor:
    """The bit patterns of float32 values, int64 in [0, 2**32)."""
    return v.contiguous().view(torch.int32).to(torch.int64) & MASK_32


def bf16_value(code: Tensor) -> Tensor:
    """float32 values of bf16 codes."""
    return (code << 16).to(torch.int32).view(torch.float32)


def bf16_stochastic(v: Tensor, random: Tensor) -> Tensor:
    """bf16 codes (int64) of float32 values, rounded up in magnitude as often as the dropped part is large."""
    bits = fp32_bits(v)
    return torch.where(v.isnan(), BF16_NAN_CODE, ((bits + (random >> 16)) & MASK_32) >> 16)


def bf16_nearest(v: Tensor) -> Tensor:
    """bf16 codes (int64) of float32 values, nearest, ties to even."""
    bits = fp32_bits(v)
    return torch.where(v.isnan(), BF16_NAN_CODE, ((bits + 0x7FFF + ((bits >> 16) & 1)) & MASK_32) >> 16)


def _fp8_finish(v: Tensor, normal: Tensor, tiny: Tensor) -> Tensor:
    bits = fp32_bits(v)
    code = torch.where((bits & ~FP32_SIGN) < FP8_MIN_NORMAL_BITS, tiny, normal).clamp(max=FP8_MAX_CODE)
    return torch.where(v.isnan(), FP8_NAN_CODE, code) | ((bits >> 24) & 0x80)


def _fp8_tiny(v: Tensor) -> Tensor:
    """Magnitudes below the normal range as they are; 0 for the others, whose result is not used."""
    return torch.where(fp32_bits(v) & ~FP32_SIGN < FP8_MIN_NORMAL_BITS, v.abs(), 0.0)


def fp8_stochastic(v: Tensor, random: Tensor) -> Tensor:
    """E4M3 codes (int64) of float32 values, unbiased from 2**-29 to 448; saturates at 448, NaN stays NaN.

    The magnitude is taken as fixed point over the codes, ``code * 2**20 + fraction``, gets 20 random bits and
    is cut. That fixed point is the FP32 pattern of ``|v| * 2**FP8_SHIFT``, which a GPU forms by that
    multiplication. Here the subnormals, whose grid is even, are formed apart, to nearest even as FP32 would:
    CPUs are slow with FP32's subnormals, and may flush them.
    """
    random = random >> (32 - FP8_FRACTION_BITS)
    normal = (fp32_bits(v) & ~FP32_SIGN) - (FP8_REBIAS << FP8_FRACTION_BITS)
    tiny = (_fp8_tiny(v).double() * FP8_TINY_SCALE).round().to(torch.int64)
    return _fp8_finish(v, (normal + random) >> FP8_FRACTION_BITS, (tiny + random) >> FP8_FRACTION_BITS)


def fp8_nearest(v: Tensor) -> Tensor:
    """E4M3 codes (int64) of float32 values, nearest, ties to even; saturates at 448, NaN stays NaN."""
    magnitude = fp32_bits(v) & ~FP32_SIGN
    half = (1 << (FP8_FRACTION_BITS - 1)) - 1
    normal = ((magnitude + half + ((magnitude >> FP8_FRACTION_BITS) & 1)) >> FP8_FRACTION_BITS) - FP8_REBIAS
    tiny = fp32_bits(_fp8_tiny(v) + FP8_TINY_MAGIC) - FP8_TINY_MAGIC_BITS
    return _fp8_finish(v, normal, tiny)


def fp8_value(code: Tensor) -> Tensor:
    """float32 values of E4M3 codes (int64), exact."""
    magnitude = code & 0x7F
    bits = torch.where(magnitude == FP8_NAN_CODE, FP32_INF | (1 << 22), (magnitude + FP8_REBIAS) << 20)
    normal = bits.to(torch.int32).view(torch.float32)
    value = torch.where(magnitude < 8, magnitude.to(torch.float32) * 2.0**-9, normal)
    return torch.where(code >= 0x80, -value, value)


def fp8_exponent(largest: Tensor) -> Tensor:
    """The exponent (int64) of groups whose largest magnitudes, finite float32, are given."""
    return ((fp32_bits(largest) >> 23) - 127 - TOP_BINADE).clamp(MIN_EXPONENT, MAX_EXPONENT)


def power_of_two(exponent: Tensor) -> Tensor:
    """``2.0**exponent`` as float32, exact, for integer exponents in [-126, 127]."""
    return ((exponent.to(torch.int32) + 127) << 23).view(torch.float32)
