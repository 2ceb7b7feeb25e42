"""A seeded permutation of [0, n) that is computed, not stored: the place of any instance in O(1) memory.

A balanced Feistel network permutes the next power of four; values that fall outside [0, n) walk along their
cycle until they fall inside (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002, cycle
walking).
"""

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 6
_GOLDEN = 0x9E3779B97F4A7C15
_MASK_64 = (1 << 64) - 1


def permute(positions_N: NDArray[np.int64], size: int, seed: int) -> NDArray[np.int64]:
    """Images of ``positions_N`` (int64, in [0, size)) under the permutation of [0, size) that ``seed`` gives.

    Raises:
        ValueError: a position is outside [0, size), or ``size`` is not in 1...2^62.
    """
    if not 0 < size <= 1 << 62:
        raise ValueError(f"size {size} is not in 1...2^62")
    if len(positions_N) and not 0 <= int(positions_N.min()) <= int(positions_N.max()) < size:
        raise ValueError(f"positions are not all in [0, {size})")
    half_bits = max(1, -(-(size - 1).bit_length() // 2))
    keys = _round_keys(seed)
    images_N = _feistel(positions_N.astype(np.uint64), half_bits, keys)
    while len(outside := np.flatnonzero(images_N >= np.uint64(size))):
        images_N[outside] = _feistel(images_N[outside], half_bits, keys)
    return images_N.astype(np.int64)


def _round_keys(seed: int) -> NDArray[np.uint64]:
    steps = [(seed + (i + 1) * _GOLDEN) & _MASK_64 for i in range(_ROUNDS)]
    return _mix(np.array(steps, dtype=np.uint64))


def _feistel(values_N: NDArray[np.uint64], half_bits: int, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left_N, right_N = values_N >> shift, values_N & mask
    for key in keys:
        left_N, right_N = right_N, left_N ^ (_mix(right_N ^ key) & mask)
    return (left_N << shift) | right_N


def _mix(values_N: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014): each bit in reaches each bit out."""
    mixed = (values_N ^ (values_N >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
