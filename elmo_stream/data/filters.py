"""Pairs of an instance and a label that no ranking may hold, such as reciprocal pairs: read, stored, looked up."""

from array import array
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from elmo_stream.data.arrays import map_array, save_array
from elmo_stream.data.index import FILTERS, StoreIndex
from elmo_stream.data.labels import LabelMap
from elmo_stream.data.readers.instance import Fields, InputFile, refusal
from elmo_stream.data.readers.label_list import LabelList
from elmo_stream.data.readers.lines import read_lines
from elmo_stream.errors import CorruptError, UserError
from elmo_stream.files import check_files

_BLOCK = 1 << 16


@dataclass(frozen=True)
class FilterPairs:
    """Pairs that no ranking may hold: rows of the split and label ids, int64."""

    row_P: NDArray[np.int64]
    label_P: NDArray[np.int64]

    def of(self, instance_B: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The pairs of a batch: places in the batch, and label ids."""
        order = np.argsort(instance_B)
        place = np.minimum(np.searchsorted(instance_B[order], self.row_P), len(order) - 1)
        here = instance_B[order][place] == self.row_P
        return order[place[here]], self.label_P[here]

    def most_per_row(self) -> int:
        """The most pairs that one instance has."""
        return int(np.unique(self.row_P, return_counts=True)[1].max(initial=0))


NO_PAIRS = FilterPairs(np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64))


def build_filter(file: InputFile, *, rows: int, fields: Fields, lookup_folder: Path, path: Path) -> tuple[int, int]:
    """Read lines ``row label``, both from 0 in the numbering of the input, and save the pairs of known labels.

    Args:
        rows: instances of the split, whose order is that of the input.
        fields: how the split's labels are named.
        lookup_folder: the converter's label map.
        path: the ``.npy`` to write: int64 (pairs, 2), ascending, none twice.

    Returns:
        Pairs kept, and pairs left out because training does not know their label, so that it is never predicted.

    Raises:
        UserError: a line is no pair, or its row or label does not exist; or no label of the file is known.
    """
    flat = _read_pairs(file, rows)
    names = LabelList(fields.names) if fields.names else None
    label_map = LabelMap(lookup_folder)
    labels, place = np.unique(flat[:, 1], return_inverse=True)
    if names is not None and len(labels) and labels[-1] >= len(names):
        raise UserError(f"{file.name}: has a label {labels[-1]}, but the list of labels ends with {len(names) - 1}.")
    ids = np.empty(len(labels), np.int64)
    for first in range(0, len(labels), _BLOCK):
        block = labels[first : first + _BLOCK].tolist()
        ids[first : first + _BLOCK] = label_map.lookup(names[block] if names else [str(label) for label in block])
    known = ids[place] >= 0
    if len(flat) and not known.any():
        raise UserError(f"{file.name}: training knows none of its labels; are the labels of the data given as ids?")
    pairs = np.unique(np.stack([flat[known, 0], ids[place][known]], axis=1), axis=0)
    save_array(path, pairs)
    return len(pairs), int(np.sum(~known))


def load_filter(store: Path, index: StoreIndex, split: str) -> FilterPairs:
    """The pairs that a store keeps for a split; none where it has no filter.

    Raises:
        CorruptError: the pairs are damaged.
    """
    name = f"{split}.npy"
    if name not in index.filters:
        return NO_PAIRS
    path = store / FILTERS / name
    check_files(store / FILTERS, {name: index.filters[name]})
    pairs = map_array(path)
    rows, labels = index.splits[split].instances, index.labels.count
    if pairs.dtype != np.int64 or pairs.ndim != 2 or pairs.shape[1:] != (2,):
        raise CorruptError(f"{path}: holds {pairs.dtype} of shape {pairs.shape}, not pairs of rows and labels.")
    if len(pairs) and (pairs.min() < 0 or np.any(pairs.max(axis=0) >= [rows, labels])):
        raise CorruptError(f"{path}: a pair lies outside of {rows} rows and {labels} labels.")
    return FilterPairs(np.ascontiguousarray(pairs[:, 0]), np.ascontiguousarray(pairs[:, 1]))


def _read_pairs(file: InputFile, rows: int) -> NDArray[np.int64]:
    numbers = array("q")
    for offset, line in read_lines(file, 0, file.path.stat().st_size):
        pieces = line.split()
        if not pieces:
            continue
        try:
            row, label = (int(piece) for piece in pieces)
            if min(row, label) < 0 or label >= 2**62:
                raise ValueError
        except ValueError as error:
            raise refusal(file, offset, "expected two numbers from 0, of a test row and a label.") from error
        if row >= rows:
            raise refusal(file, offset, f"row {row} is not in 0...{rows - 1}, the rows of the test split.")
        numbers.append(row)
        numbers.append(label)
    return np.frombuffer(numbers, np.int64).reshape(-1, 2) if numbers else np.empty((0, 2), np.int64)
