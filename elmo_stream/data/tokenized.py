"""One part of the input tokenised: rows in the order of the input, labels numbered within the part.

The ids of labels are not known while parts are read, perhaps by other machines. So a part numbers its own labels as
they occur, and keeps the hash of each once; :meth:`TokenizedPart.rows` puts in the final ids.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from elmo_stream.data.arrays import map_array, save_array
from elmo_stream.data.bow import BagOfFeatures
from elmo_stream.data.hashing import hash_names
from elmo_stream.data.labels import LabelMap
from elmo_stream.data.readers.instance import RawInstance
from elmo_stream.data.store import Shard, concatenate, offsets_of
from elmo_stream.data.tokenize import Tokenizer
from elmo_stream.files import read_json, write_json_durably

_ARRAYS = ("tokens", "token_offsets", "labels", "label_offsets")
_WEIGHTS = "token_weights"
_BATCH_ROWS = 1024
_COUNTS_FILE = "tokenized.json"


@dataclass(frozen=True)
class TokenizedPart:
    """Rows whose labels are places in ``hash_L`` and ``check_L`` (uint64), and how many texts were truncated."""

    local: Shard
    hash_L: NDArray[np.uint64]
    check_L: NDArray[np.uint64]
    truncated: int

    def rows(self, label_map: LabelMap) -> tuple[Shard, int]:
        """The rows with label ids, ascending within each row, and how many occurrences of labels are unknown."""
        id_L = label_map.lookup_hashes(self.hash_L, self.check_L)
        ids, counts = id_L[self.local.labels], np.diff(self.local.label_offsets)
        row = np.repeat(np.arange(self.local.rows), counts)
        known = ids >= 0
        ids, row = ids[known], row[known]
        offsets = offsets_of(np.bincount(row, minlength=self.local.rows))
        ids = ids[np.lexsort((ids, row))]
        rows = Shard(self.local.tokens, self.local.token_offsets, ids, offsets, self.local.token_weights)
        return rows, int(np.sum(~known))

    def save(self, folder: Path) -> None:
        """Write the arrays into an existing folder."""
        save_arrays(folder, self.local)
        save_array(folder / "hash.npy", self.hash_L)
        save_array(folder / "check.npy", self.check_L)
        write_json_durably(folder / _COUNTS_FILE, {"truncated": self.truncated})

    @classmethod
    def load(cls, folder: Path) -> "TokenizedPart | None":
        """What :meth:`save` wrote, or None when the part was counted before the tokenizer was known."""
        if not (folder / _COUNTS_FILE).is_file():
            return None
        hash_L, check_L = (map_array(folder / f"{name}.npy") for name in ("hash", "check"))
        return cls(load_arrays(folder), hash_L, check_L, read_json(folder / _COUNTS_FILE)["truncated"])


def tokenize_part(tokenizer: Tokenizer | BagOfFeatures, instances: Iterable[RawInstance]) -> TokenizedPart:
    """Tokenise all instances of a part."""
    places: dict[str, int] = {}
    tokens, token_offsets, weights, truncated = _encode(tokenizer, [])
    pieces = [Shard(tokens, token_offsets, np.empty(0, np.int64), np.zeros(1, np.int64), weights)]
    remaining = iter(instances)
    while batch := list(islice(remaining, _BATCH_ROWS)):
        tokens, token_offsets, weights, cut = _encode(tokenizer, batch)
        local = [places.setdefault(label, len(places)) for instance in batch for label in instance.labels]
        label_offsets = offsets_of([len(instance.labels) for instance in batch])
        pieces.append(Shard(tokens, token_offsets, np.array(local, np.int64), label_offsets, weights))
        truncated += cut
    hash_L, check_L = hash_names([label.encode() for label in places])
    return TokenizedPart(concatenate(pieces), hash_L, check_L, truncated)


def _encode(
    tokenizer: Tokenizer | BagOfFeatures, batch: Sequence[RawInstance]
) -> tuple[NDArray[Any], NDArray[np.int64], NDArray[np.float32] | None, int]:
    """Token ids, their offsets, their weights if they have some, and how many instances were cut."""
    if isinstance(tokenizer, BagOfFeatures):
        return tokenizer.encode_features([instance.features for instance in batch if instance.features is not None])
    tokens, token_offsets, cut = tokenizer.encode_batch([instance.text for instance in batch])
    return tokens, token_offsets, None, cut


def save_arrays(folder: Path, rows: Shard) -> None:
    """Write the arrays of rows as ``.npy`` files, to be mapped."""
    for name in _ARRAYS:
        save_array(folder / f"{name}.npy", getattr(rows, name))
    if rows.token_weights is not None:
        save_array(folder / f"{_WEIGHTS}.npy", rows.token_weights)


def load_arrays(folder: Path) -> Shard:
    """Map what :func:`save_arrays` wrote."""
    names = [*_ARRAYS, *([_WEIGHTS] if (folder / f"{_WEIGHTS}.npy").exists() else [])]
    return Shard(**{name: map_array(folder / f"{name}.npy") for name in names})
