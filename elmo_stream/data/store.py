"""A shard in memory, and the store that writes and reads shards through one of its backends.

A backend knows one thing: how the arrays of a shard lie in the files of a folder. Names, sizes, checksums and the sense
of the content are checked here, for all backends alike and before anything of a declared size is allocated.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from elmo_stream.data.index import BOW, ShardEntry, StoreIndex
from elmo_stream.data.remote import shards_of
from elmo_stream.errors import CorruptError
from elmo_stream.files import Readable, list_files, naming, new_folder, read_listed

_TAKE_ROWS = 4096
_MAX_SHARD_BYTES = 1 << 40


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


@dataclass(frozen=True)
class ArraySpec:
    """One array of a shard as it lies on disk: its attribute in :class:`Shard`, its type and its length."""

    name: str
    dtype: np.dtype[Any]
    length: int

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return self.length * self.dtype.itemsize


def array_specs(
    *, rows: int, tokens: int, positives: int, vocab_size: int, weighted: bool = False
) -> tuple[ArraySpec, ...]:
    """The arrays of a shard with these sizes, in the order in which backends write them."""
    weights = (ArraySpec("token_weights", np.dtype("<f4"), tokens),) if weighted else ()
    return (
        ArraySpec("token_offsets", np.dtype("<i8"), rows + 1),
        ArraySpec("tokens", token_dtype(vocab_size), tokens),
        ArraySpec("label_offsets", np.dtype("<i8"), rows + 1),
        ArraySpec("labels", np.dtype("<u4"), positives),
        *weights,
    )


class Backend(Protocol):
    """How the arrays of a shard lie in files; stateless. A shard's folder holds exactly the files it names."""

    def write(self, folder: Path, shard: Shard, specs: Sequence[ArraySpec]) -> None:
        """Write the arrays into an empty folder."""

    def lengths(self, folder: Path) -> dict[str, int]:
        """Length of every array of a shard that was written whole."""

    def files(self, specs: Sequence[ArraySpec]) -> dict[str, int]:
        """The files of a shard of these sizes, as POSIX paths within its folder, and the most bytes of each."""

    def read(self, content: Mapping[str, bytes], specs: Sequence[ArraySpec]) -> Shard:
        """Decode the files of a shard; allocates no more than the specs say and the files can hold.

        Raises:
            ValueError: the files do not hold these arrays; says what is wrong in which file.
        """


class ShardStore:
    """The shards of one store, each a folder ``ROOT/SPLIT/shard-NNNNN``; reading is thread-safe.

    Args:
        root: folder of the store.
        shards: where shards are read from; by default the same folder.
        vocab_size: token ids are below it.
        num_labels: label ids are below it.
        weighted: every token has a weight.
    """

    def __init__(
        self,
        backend: Backend,
        root: Path,
        *,
        vocab_size: int,
        num_labels: int,
        weighted: bool = False,
        shards: Readable | None = None,
    ) -> None:
        self._backend, self._root = backend, root
        self._shards: Readable = shards or root
        self._vocab_size, self._num_labels, self._weighted = vocab_size, num_labels, weighted

    def write_shard(self, split: str, name: str, shard: Shard) -> ShardEntry:
        """Write a shard durably, its folder appearing complete with one rename; returns its entry for the index.

        Raises:
            UserError: the shard exists already.
        """
        folder = self._root / split / name
        with new_folder(folder) as temporary:
            specs = self._specs(shard.rows, len(shard.tokens), len(shard.labels))
            self._backend.write(temporary, shard, specs)
        return self._entry(folder)

    def describe_shard(self, split: str, name: str) -> ShardEntry | None:
        """The entry of a shard written earlier, or None when there is no such shard."""
        folder = self._root / split / name
        return self._entry(folder) if folder.is_dir() else None

    def read_shard(self, split: str, entry: ShardEntry) -> Shard:
        """Read a whole shard and check it against its entry.

        Raises:
            CorruptError: a file is missing, cut or altered, or the content inconsistent; names it.
            OSError: a file cannot be read, or its URL not be reached.
        """
        folder = self._shards / split / entry.name
        specs = self._specs(entry.rows, entry.tokens, entry.positives)
        if sum(spec.nbytes for spec in specs) > _MAX_SHARD_BYTES:
            raise CorruptError(f"{folder}: the index gives a size that no shard has.")
        most = self._backend.files(specs)
        if set(entry.files) != set(most) or any(entry.files[name]["bytes"] > limit for name, limit in most.items()):
            raise CorruptError(f"{folder}: the index lists other files than a shard of its size has.")
        content = {name: read_listed(folder / name, listed) for name, listed in entry.files.items()}
        try:
            shard = self._backend.read(content, specs)
            self._check_content(shard)
        except ValueError as error:
            raise CorruptError(f"{folder}/{error}; the shard is damaged.") from error
        return shard

    def _specs(self, rows: int, tokens: int, positives: int) -> tuple[ArraySpec, ...]:
        return array_specs(
            rows=rows, tokens=tokens, positives=positives, vocab_size=self._vocab_size, weighted=self._weighted
        )

    def _entry(self, folder: Path) -> ShardEntry:
        with naming(folder):
            lengths = self._backend.lengths(folder)
        return ShardEntry(
            name=folder.name,
            rows=lengths["token_offsets"] - 1,
            tokens=lengths["tokens"],
            positives=lengths["labels"],
            files=list_files(folder),
        )

    def _check_content(self, shard: Shard) -> None:
        for key, values, offsets, least in (
            ("token_offsets", shard.tokens, shard.token_offsets, 1),
            ("label_offsets", shard.labels, shard.label_offsets, 0),
        ):
            if offsets[0] != 0 or offsets[-1] != len(values) or offsets.min() < 0 or np.any(np.diff(offsets) < least):
                raise ValueError(f"{key}: offsets do not ascend from 0 to {len(values)}")
        if len(shard.tokens) and int(shard.tokens.max()) >= self._vocab_size:
            raise ValueError(f"tokens: a token id is not below the vocabulary size {self._vocab_size}")
        if shard.token_weights is not None and not np.isfinite(shard.token_weights).all():
            raise ValueError("token_weights: a weight is not finite")
        if len(shard.labels) and int(shard.labels.max()) >= self._num_labels:
            raise ValueError(f"labels: a label id is not below the number of labels {self._num_labels}")
        ascends = np.diff(shard.labels) > 0
        inner_starts = shard.label_offsets[1:-1]
        ascends[inner_starts[(inner_starts > 0) & (inner_starts < len(shard.labels))] - 1] = True
        if not ascends.all():
            raise ValueError("labels: labels of an instance are not in ascending order")


def create_store(backend: str, root: Path, *, vocab_size: int, num_labels: int, weighted: bool = False) -> ShardStore:
    """A store to write shards to; ``vocab_size`` and ``num_labels`` bound the ids that it accepts.

    ``weighted`` says that every token has a weight.
    """
    return ShardStore(_backend(backend), root, vocab_size=vocab_size, num_labels=num_labels, weighted=weighted)


def open_store(root: Path) -> ShardStore:
    """Open a finished store for reading; raises what :meth:`StoreIndex.load` raises."""
    index = StoreIndex.load(root)
    return ShardStore(
        _backend(index.backend),
        root,
        vocab_size=index.tokenizer.vocab_size,
        num_labels=index.labels.count,
        weighted=index.tokenizer.kind == BOW,
        shards=shards_of(root),
    )


def _backend(name: str) -> Backend:
    if name == "zarr":
        from elmo_stream.data.store_zarr import ZarrBackend

        return ZarrBackend()
    if name == "webdataset":
        from elmo_stream.data.store_webdataset import WebDatasetBackend

        return WebDatasetBackend()
    raise ValueError(f"unknown store backend {name!r}")
