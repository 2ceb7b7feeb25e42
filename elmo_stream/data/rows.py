"""The rows that a loader goes over, shard by shard: those of a split, and perhaps the labels' names among them.

A label's name, or its text where the data brought one, as one more training instance, whose one label is itself,
teaches the encoder what labels are called (label-text augmentation: Renee, Jain et al., MLSys 2023). They are tokenised
when their shard is read, so they take no memory and no file.
"""

from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from elmo_stream.data.bow import is_bow
from elmo_stream.data.index import StoreIndex
from elmo_stream.data.labels import LabelNames
from elmo_stream.data.shuffle import permute
from elmo_stream.data.store import Shard, concatenate, offsets_of, open_store
from elmo_stream.data.tokenize import Tokenizer
from elmo_stream.errors import UserError

_NAMES_AT_ONCE = 1 << 16


class Rows(Protocol):
    """Shards of rows, numbered through; ``sizes`` are the rows of each shard that are in use."""

    sizes: NDArray[np.int64]

    def read(self, shard: int) -> Shard:
        """The rows of a shard, of which those behind ``sizes[shard]`` are not in use; may be called by threads.

        Raises:
            CorruptError: the shard is damaged; names it.
        """

    def instances(self, row: NDArray[np.int64]) -> NDArray[np.int64]:
        """What rows are called outside: rows of the split from 0 on, then label names."""


class SplitRows:
    """The first ``last`` rows of a split."""

    def __init__(self, store: Path, index: StoreIndex, split: str, last: int) -> None:
        self._store, self._split, self._entries = open_store(store), split, index.splits[split].shards
        ends = np.minimum(np.cumsum([entry.rows for entry in self._entries]), last)
        sizes = np.diff(ends, prepend=0)
        self.sizes: NDArray[np.int64] = sizes[sizes > 0]

    def read(self, shard: int) -> Shard:
        """See :class:`Rows`."""
        return self._store.read_shard(self._split, self._entries[shard])

    def instances(self, row: NDArray[np.int64]) -> NDArray[np.int64]:
        """See :class:`Rows`."""
        return row


class LabelNameRows:
    """The names (or texts) of all labels, each with its own label, in an order that depends on the seed alone.

    Raises:
        UserError: the rows of the store are features, not texts.
    """

    def __init__(self, store: Path, *, seed: int) -> None:
        if is_bow(store / "tokenizer"):
            raise UserError("train.label_texts: the store holds features, which names are not; set it to false.")
        self._names, self._tokenizer = LabelNames(store / "labels"), Tokenizer.load(store / "tokenizer")
        self._seed = seed
        starts = np.append(np.arange(0, len(self), _NAMES_AT_ONCE), len(self))
        self.sizes: NDArray[np.int64] = np.diff(starts)

    def __len__(self) -> int:
        return len(self._names)

    def read(self, shard: int) -> Shard:
        """See :class:`Rows`."""
        return self.read_between(shard * _NAMES_AT_ONCE, min((shard + 1) * _NAMES_AT_ONCE, len(self)))

    def read_between(self, first: int, last: int) -> Shard:
        """The names at the places ``first`` to ``last`` of the order."""
        label_L = permute(np.arange(first, last), len(self), self._seed)
        names = self._names[label_L]
        texts = self._names.texts(label_L) or names
        tokens, token_offsets, _ = self._tokenizer.encode_batch(
            [text or name for text, name in zip(texts, names, strict=True)]
        )
        return Shard(tokens, token_offsets, label_L, np.arange(len(label_L) + 1))

    def instances(self, row: NDArray[np.int64]) -> NDArray[np.int64]:
        """See :class:`Rows`."""
        return row


class RowsWithLabelTexts:
    """Rows, and behind those of each shard its share of the labels' names.

    Equal shares of shuffled names make every window of shards a random sample of rows and names alike.
    """

    def __init__(self, rows: SplitRows, names: LabelNameRows) -> None:
        self._rows, self._names = rows, names
        self._row_start = offsets_of(rows.sizes)
        self._name_start = self._row_start * len(names) // self._row_start[-1]
        self.sizes: NDArray[np.int64] = rows.sizes + np.diff(self._name_start)
        self._start = offsets_of(self.sizes)

    def read(self, shard: int) -> Shard:
        """See :class:`Rows`."""
        own = self._rows.read(shard).rows_between(0, int(self._rows.sizes[shard]))
        names = self._names.read_between(int(self._name_start[shard]), int(self._name_start[shard + 1]))
        return concatenate([own, names])

    def instances(self, row: NDArray[np.int64]) -> NDArray[np.int64]:
        """See :class:`Rows`; a name has the number of its place in the shuffled order, behind all rows in use."""
        shard = np.searchsorted(self._start, row, side="right") - 1
        within = row - self._start[shard]
        name = within - self._rows.sizes[shard]
        return np.where(name < 0, self._row_start[shard] + within, self._row_start[-1] + self._name_start[shard] + name)
