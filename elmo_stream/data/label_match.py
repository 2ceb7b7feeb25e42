"""Which label of one store is which of another: by name, since ids follow the frequencies of each."""

import numpy as np
from numpy.typing import NDArray

from elmo_stream.data.hashing import hash_names
from elmo_stream.data.labels import LabelNames

ABSENT = 2**32 - 1
PART_LABELS = 8 << 20
_BLOCK_LABELS = 1 << 16


def match_labels(old: LabelNames, new: LabelNames) -> NDArray[np.uint32]:
    """Id in ``old`` of each label of ``new``, ``ABSENT`` where ``old`` has none of that name.

    Takes 4 bytes a label, and about 50 for each of the ``PART_LABELS`` that are compared at a time: more labels than
    that are hashed once for each part.
    """
    found_L = np.full(len(new), ABSENT, dtype=np.uint32)
    parts = -(-max(len(old), len(new)) // PART_LABELS)
    for part in range(parts):
        old_hash, old_check, old_id = _hashed(old, part, parts)
        new_hash, new_check, new_id = _hashed(new, part, parts)
        if not len(old_id):
            continue
        order = np.argsort(old_hash)
        place = order[np.minimum(np.searchsorted(old_hash[order], new_hash), len(order) - 1)]
        same = (old_hash[place] == new_hash) & (old_check[place] == new_check)
        found_L[new_id[same]] = old_id[place[same]]
    return found_L


def _hashed(
    names: LabelNames, part: int, parts: int
) -> tuple[NDArray[np.uint64], NDArray[np.uint64], NDArray[np.uint32]]:
    """(hash, check, id) of the labels whose hash belongs to this part."""
    hashes, checks, ids = [], [], []
    for first in range(0, len(names), _BLOCK_LABELS):
        block = np.arange(first, min(first + _BLOCK_LABELS, len(names)))
        hash_N, check_N = hash_names([name.encode() for name in names[block]])
        mine = hash_N % np.uint64(parts) == part
        hashes.append(hash_N[mine])
        checks.append(check_N[mine])
        ids.append(block[mine].astype(np.uint32))
    return np.concatenate(hashes), np.concatenate(checks), np.concatenate(ids)
