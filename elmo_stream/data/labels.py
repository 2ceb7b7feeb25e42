"""Labels: names by id for people, ids by name for the converter, and inverse propensities for the metrics.

Ids are given by falling training frequency, ties by ascending hash of the name, so that frequent labels share
chunks and the numbering depends on nothing but the training data.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from elmo_stream.data.arrays import map_array
from elmo_stream.data.hashing import hash_names
from elmo_stream.errors import CorruptError

NAMES_FILE, OFFSETS_FILE, FREQUENCY_FILE = "names.bin", "offsets.npy", "frequency.npy"
TEXTS_FILE, TEXT_OFFSETS_FILE = "texts.bin", "text_offsets.npy"
HASHES_FILE, CHECKS_FILE, IDS_FILE = "hashes.npy", "checks.npy", "ids.npy"


class LabelNames:
    """Label names by id, memory-mapped: ``names[ids]`` reads only the names asked for.

    Args:
        folder: ``labels/`` of a store or a run: ``names.bin`` (UTF-8, concatenated by id), ``offsets.npy``
            (int64, L + 1), ``frequency.npy`` (uint32, L).

    Attributes:
        frequency_L: uint32, number of training instances of each label, falling.

    Raises:
        CorruptError: a file is missing or inconsistent; names it.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / NAMES_FILE
        self._offsets = _open_array(folder / OFFSETS_FILE, "<i8")
        self.frequency_L: NDArray[np.uint32] = _open_array(folder / FREQUENCY_FILE, "<u4")
        if not self._path.is_file():
            raise CorruptError(f"{self._path}: missing, though it belongs to the labels.")
        size = self._path.stat().st_size
        if len(self._offsets) != len(self.frequency_L) + 1 or not len(self.frequency_L):
            raise CorruptError(f"{folder}: {OFFSETS_FILE} and {FREQUENCY_FILE} do not fit together.")
        if size == 0 or self._offsets[0] != 0 or self._offsets[-1] != size:
            raise CorruptError(f"{self._path}: has {size} bytes where {int(self._offsets[-1])} were written.")
        self._names = np.memmap(self._path, dtype=np.uint8, mode="r")

    def __len__(self) -> int:
        return len(self.frequency_L)

    def __getitem__(self, ids: Sequence[int] | NDArray[np.int64]) -> list[str]:
        """Names of the labels ``ids`` (each in [0, L)), in their order.

        Raises:
            IndexError: an id is out of range.
            CorruptError: the names are damaged.
        """
        index = np.asarray(ids, dtype=np.int64)
        if len(index) and not 0 <= int(index.min()) <= int(index.max()) < len(self):
            raise IndexError(f"label ids must be in [0, {len(self)})")
        starts, ends = self._offsets[index].tolist(), self._offsets[index + 1].tolist()
        try:
            return [self._name(start, end) for start, end in zip(starts, ends, strict=True)]
        except ValueError as error:
            raise CorruptError(
                f"{self._path}: a label name cannot be read ({error}); the labels are damaged."
            ) from error

    def texts(self, ids: Sequence[int] | NDArray[np.int64]) -> list[str] | None:
        """Texts of labels, in their order; None where the data brought none.

        Raises:
            CorruptError: the texts are damaged.
        """
        path = self._path.with_name(TEXTS_FILE)
        if not path.exists():
            return None
        offsets = _open_array(path.with_name(TEXT_OFFSETS_FILE), "<i8")
        if len(offsets) != len(self._offsets):
            raise CorruptError(f"{path}: belongs to {len(offsets) - 1} labels, not to {len(self)}.")
        index = np.asarray(ids, dtype=np.int64)
        blob = np.memmap(path, dtype=np.uint8, mode="r") if path.stat().st_size else np.empty(0, np.uint8)
        spans = zip(offsets[index].tolist(), offsets[index + 1].tolist(), strict=True)
        try:
            return [blob[start:end].tobytes().decode("utf-8") for start, end in spans]
        except ValueError as error:
            raise CorruptError(f"{path}: a text cannot be read ({error}); the labels are damaged.") from error

    def _name(self, start: int, end: int) -> str:
        if not 0 <= start < end <= len(self._names):
            raise ValueError(f"offsets {start} and {end}")
        return self._names[start:end].tobytes().decode("utf-8")


class LabelMap:
    """Label ids by name: 20 memory-mapped bytes a label, shared by all processes that open the same folder.

    Args:
        folder: scratch that :func:`elmo_stream.data.label_build.build_labels` made: ``hashes.npy`` (uint64,
            ascending), ``checks.npy`` (uint64) and ``ids.npy`` (uint32), in the same order.
    """

    def __init__(self, folder: Path) -> None:
        self._hashes = _open_array(folder / HASHES_FILE, "<u8")
        self._checks = _open_array(folder / CHECKS_FILE, "<u8")
        self._ids = _open_array(folder / IDS_FILE, "<u4")

    def __len__(self) -> int:
        return len(self._ids)

    def lookup(self, names: Sequence[str]) -> NDArray[np.int64]:
        """Ids of ``names`` as int64, -1 for a name that the training split does not have."""
        return self.lookup_hashes(*hash_names([name.encode() for name in names]))

    def lookup_hashes(self, hashes: NDArray[np.uint64], checks: NDArray[np.uint64]) -> NDArray[np.int64]:
        """The same by the hashes of the names."""
        places = np.minimum(np.searchsorted(self._hashes, hashes), len(self) - 1)
        known = (self._hashes[places] == hashes) & (self._checks[places] == checks)
        return np.where(known, self._ids[places].astype(np.int64), -1)


def inverse_propensity_L(
    frequency_L: NDArray[np.unsignedinteger] | NDArray[np.signedinteger],
    num_instances: int,
    A: float,
    B: float,
) -> NDArray[np.float64]:
    """Inverse propensities ``q = 1 + C (f + B)^-A`` with ``C = (ln N - 1)(B + 1)^A``, float64, one per label.

    Source: Jain, Prabhu, Varma, "Extreme Multi-label Loss Functions for Recommendation, Tagging, Ranking and
    Other Missing Label Applications", KDD 2016, section 4. C is not let below 0 (it would be for N < e),
    since a propensity is at most 1.

    Args:
        frequency_L: training instances of each label.
        num_instances: N, training instances.
        A, B: parameters of the data set; 0.55 and 1.5 unless it has its own.
    """
    C = max(0.0, np.log(num_instances) - 1.0) * (B + 1.0) ** A
    return np.asarray(1.0 + C * (frequency_L.astype(np.float64) + B) ** -A, dtype=np.float64)


class InversePropensity:
    """``inverse_propensity_L`` of the labels asked for: ``q[ids]`` takes memory for ``ids`` only."""

    def __init__(self, frequency_L: NDArray[np.uint32], num_instances: int, A: float, B: float) -> None:
        self._frequency_L, self._parameters = frequency_L, (num_instances, A, B)

    def __len__(self) -> int:
        return len(self._frequency_L)

    def __getitem__(self, ids: NDArray[np.int64]) -> NDArray[np.float64]:
        """float64, in the shape of ``ids``."""
        return inverse_propensity_L(self._frequency_L[ids], *self._parameters)


def _open_array(path: Path, dtype: str) -> NDArray:
    """Map a one-dimensional ``.npy`` file of ours."""
    try:
        array = map_array(path)
    except FileNotFoundError as error:
        raise CorruptError(f"{path}: missing, though it belongs to the labels.") from error
    if array.dtype != np.dtype(dtype) or array.ndim != 1:
        raise CorruptError(f"{path}: holds {array.dtype} of shape {array.shape}, not a list of {dtype}.")
    return array
