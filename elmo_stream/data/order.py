"""The order of training instances: a pure function of (seed, epoch), found at any position without a walk.

Shards are permuted per epoch; the instances of a window of ``WINDOW_SHARDS`` consecutive shards are permuted together.
The random words come from Philox with explicit counters and are read raw, because raw words are the part of NumPy's
generators that stays the same in every version. A batch touches the shards of one window only, so the converter has
to shuffle globally once.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

WINDOW_SHARDS = 4

# Word 2 of the Philox counter tells apart what a permutation is for.
_FOR_SHARDS, _FOR_WINDOW, _FOR_BATCHES = 0, 1, 2


def permutation(count: int, *, seed: int, epoch: int, purpose: int, index: int = 0) -> np.ndarray:
    """A permutation (int64) of ``range(count)`` that depends on the arguments only."""
    words = np.random.Philox(key=[seed, epoch], counter=[0, 0, purpose, index]).random_raw(count)
    return np.argsort(words, kind="stable")


def batch_permutation(count: int, *, seed: int, epoch: int, group: int) -> np.ndarray:
    """The order in which the batches of one length-sorted group are trained."""
    return permutation(count, seed=seed, epoch=epoch, purpose=_FOR_BATCHES, index=group)


class ShuffledOrder:
    """Instance ids by position for one epoch, in memory that does not grow with the data set's instances.

    Args:
        shard_rows: instances of each shard; an instance's id is its row in the concatenation of the shards.
    """

    def __init__(self, shard_rows: Sequence[int], *, seed: int, epoch: int) -> None:
        rows = np.asarray(shard_rows, dtype=np.int64)
        self._seed, self._epoch = seed, epoch
        self._first_id = np.concatenate([[0], np.cumsum(rows)])
        self._shards = permutation(len(rows), seed=seed, epoch=epoch, purpose=_FOR_SHARDS)
        self._rows = rows
        per_window = np.add.reduceat(rows[self._shards], np.arange(0, len(rows), WINDOW_SHARDS))
        self._window_start = np.concatenate([[0], np.cumsum(per_window)])
        self._window = lru_cache(maxsize=2)(self._permuted_window)

    def __len__(self) -> int:
        return int(self._first_id[-1])

    def _permuted_window(self, window: int) -> np.ndarray:
        shards = self._shards[window * WINDOW_SHARDS : (window + 1) * WINDOW_SHARDS]
        ids = np.concatenate([np.arange(self._first_id[s], self._first_id[s + 1]) for s in shards])
        return ids[permutation(len(ids), seed=self._seed, epoch=self._epoch, purpose=_FOR_WINDOW, index=window)]

    def ids(self, start: int, stop: int) -> np.ndarray:
        """Instance ids (int64) at positions ``start`` to ``stop`` of this epoch."""
        pieces = []
        window = int(np.searchsorted(self._window_start, start, side="right")) - 1
        while start < min(stop, len(self)):
            first, last = self._window_start[window], self._window_start[window + 1]
            end = min(stop, last)
            pieces.append(self._window(window)[start - first : end - first])
            start, window = int(end), window + 1
        return np.concatenate(pieces) if pieces else np.empty(0, dtype=np.int64)

    def shards(self, start: int, stop: int) -> set[int]:
        """The shards of the windows that these positions lie in, without finding their ids."""
        first = int(np.searchsorted(self._window_start, start, side="right")) - 1
        last = int(np.searchsorted(self._window_start, min(stop, len(self)), side="left"))
        return set(self._shards[first * WINDOW_SHARDS : last * WINDOW_SHARDS].tolist())


class StoredOrder:
    """Instance ids in the order of the store, for evaluation: positions ``first`` to ``last`` of the split."""

    def __init__(self, shard_rows: Sequence[int], first: int, last: int) -> None:
        self._first, self._last = first, last
        self._end_id = np.cumsum(shard_rows, dtype=np.int64)

    def __len__(self) -> int:
        return self._last - self._first

    def ids(self, start: int, stop: int) -> np.ndarray:
        """Instance ids (int64) at positions ``start`` to ``stop`` of the range."""
        return np.arange(self._first + start, min(self._first + stop, self._last), dtype=np.int64)

    def shards(self, start: int, stop: int) -> set[int]:
        """The shards that these positions lie in."""
        ends = [self._first + start, min(self._first + stop, self._last) - 1]
        first, last = np.searchsorted(self._end_id, ends, side="right")
        return set(range(int(first), int(last) + 1))
