"""A shard in memory, and the one protocol behind which every way of storing shards sits."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from elmo_stream.data.index import BOW, ShardEntry, StoreIndex

_TAKE_ROWS = 4096


@dataclass(frozen=True)
class Shard:
    """Instances as flat arrays: row ``i`` has ``tokens[token_offsets[i]:token_offsets[i + 1]]``, and so on.

    Attributes:
        tokens: token ids, uint16 where the vocabulary has fewer than 65,536 entries, else uint32.
        token_offsets: int64, rows + 1, from 0.
        labels: label ids, int64, strictly ascending within a row.
        label_offsets: int64, rows + 1, from 0.
        token_weights: float32, one a token; None where tokens have no weights.
    """

    tokens: NDArray[Any]
    token_offsets: NDArray[np.int64]
    labels: NDArray[np.int64]
    label_offsets: NDArray[np.int64]
    token_weights: NDArray[np.float32] | None = None

    @property
    def rows(self) -> int:
        """Number of instances."""
        return len(self.token_offsets) - 1

    def rows_between(self, begin: int, end: int) -> "Shard":
        """Rows ``begin`` to ``end``, as a copy."""
        token_range = slice(int(self.token_offsets[begin]), int(self.token_offsets[end]))
        label_range = slice(int(self.label_offsets[begin]), int(self.label_offsets[end]))
        return Shard(
            tokens=np.array(self.tokens[token_range]),
            token_offsets=self.token_offsets[begin : end + 1] - token_range.start,
            labels=np.array(self.labels[label_range], dtype=np.int64),
            label_offsets=self.label_offsets[begin : end + 1] - label_range.start,
            token_weights=None if self.token_weights is None else np.array(self.token_weights[token_range]),
        )

    def take(self, rows: NDArray[np.int64]) -> "Shard":
        """The given rows, in the given order."""
        tokens, token_offsets = _take_ragged(self.tokens, self.token_offsets, rows)
        labels, label_offsets = _take_ragged(self.labels, self.label_offsets, rows)
        weights = None
        if self.token_weights is not None:
            weights = _take_ragged(self.token_weights, self.token_offsets, rows)[0]
        return Shard(tokens, token_offsets, labels, label_offsets, weights)


def concatenate(shards: Sequence[Shard]) -> Shard:
    """The rows of all shards, one after another; all have weights of tokens, or none has."""
    weights = [shard.token_weights for shard in shards if shard.token_weights is not None]
    return Shard(
        tokens=np.concatenate([shard.tokens for shard in shards]),
        token_offsets=_join_offsets([shard.token_offsets for shard in shards]),
        labels=np.concatenate([shard.labels for shard in shards]),
        label_offsets=_join_offsets([shard.label_offsets for shard in shards]),
        token_weights=np.concatenate(weights) if weights else None,
    )


def offsets_of(lengths: NDArray[np.int64] | Sequence[int]) -> NDArray[np.int64]:
    """Offsets (int64, ``len(lengths) + 1``, from 0) of rows with these lengths."""
    offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def _join_offsets(parts: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    return offsets_of(np.concatenate([np.diff(offsets) for offsets in parts]))


def _take_ragged(
    values: NDArray[Any], offsets: NDArray[np.int64], rows: NDArray[np.int64]
) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Ragged rows in a new order, in blocks: the index of a block takes eight bytes a value."""
    starts, new_offsets = offsets[rows], offsets_of(np.diff(offsets)[rows])
    taken = np.empty(int(new_offsets[-1]), dtype=values.dtype)
    for first in range(0, len(rows), _TAKE_ROWS):
        ends = new_offsets[first : first + _TAKE_ROWS + 1]
        shifts = np.repeat(starts[first : first + _TAKE_ROWS] - ends[:-1], np.diff(ends))
        taken[ends[0] : ends[-1]] = values[shifts + np.arange(ends[0], ends[-1])]
    return taken, new_offsets


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Type of stored token ids: uint16 where the vocabulary has fewer than 65,536 entries, else uint32."""
    return np.dtype(np.uint16) if vocab_size < 65_536 else np.dtype(np.uint32)


class ShardStore(Protocol):
    """Writes and reads whole shards; thread-safe for reading."""

    def write_shard(self, split: str, name: str, shard: Shard) -> ShardEntry:
        """Write a shard durably under a name that does not exist yet; returns its entry for the index."""

    def describe_shard(self, split: str, name: str) -> ShardEntry | None:
        """The entry of a shard written earlier, or None when there is no such shard."""

    def read_shard(self, split: str, entry: ShardEntry) -> Shard:
        """Read a whole shard and check it against its entry.

        Raises:
            CorruptError: a file is missing, cut or altered, or the content inconsistent; names it.
        """


def create_store(backend: str, root: Path, *, vocab_size: int, num_labels: int, weighted: bool = False) -> ShardStore:
    """A store to write shards to; ``vocab_size`` and ``num_labels`` bound the ids that it accepts.

    ``weighted`` says that every token has a weight.
    """
    if backend == "zarr":
        from elmo_stream.data.store_zarr import ZarrStore

        return ZarrStore(root, vocab_size=vocab_size, num_labels=num_labels, weighted=weighted)
    raise ValueError(f"unknown store backend {backend!r}")


def open_store(root: Path) -> ShardStore:
    """Open a finished store for reading; raises what :meth:`StoreIndex.load` raises."""
    index = StoreIndex.load(root)
    return create_store(
        index.backend,
        root,
        vocab_size=index.tokenizer.vocab_size,
        num_labels=index.labels.count,
        weighted=index.tokenizer.kind == BOW,
    )
