"""Label names as 128-bit hashes: 64 to sort and look up by, 64 to tell apart what shares those."""

from collections.abc import Sequence
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray


def hash_names(names: Sequence[bytes]) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """BLAKE2b-128 of each name as two uint64 arrays (hash, check), each of ``len(names)``."""
    digests = b"".join([blake2b(name, digest_size=16).digest() for name in names])
    pairs = np.frombuffer(digests, dtype="<u8").reshape(-1, 2).astype(np.uint64)
    return pairs[:, 0].copy(), pairs[:, 1].copy()
