"""Runs of label counts: sorted by hash, spilled to disk, written and read from front to back."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from elmo_stream.data.hashing import hash_names

RECORD = np.dtype([("hash", "<u8"), ("check", "<u8"), ("count", "<i8"), ("length", "<i4")])
_COUNTER_LABELS = 1 << 17
_MAX_HASH = np.uint64(2**64 - 1)


@dataclass(frozen=True)
class Run:
    """A spilled run: ``FOLDER/NAME.records`` and ``FOLDER/NAME.names``."""

    folder: Path
    name: str

    @property
    def records_path(self) -> Path:
        """Records sorted by hash."""
        return self.folder / f"{self.name}.records"

    @property
    def names_path(self) -> Path:
        """UTF-8 names, concatenated in the order of the records."""
        return self.folder / f"{self.name}.names"

    def remove(self) -> None:
        """Delete both files."""
        self.records_path.unlink()
        self.names_path.unlink()


class LabelCounter:
    """Counts labels, spilling a run into ``folder`` whenever it holds ``most`` distinct ones.

    Attributes:
        runs: names of the runs written so far; complete after :meth:`close`.
    """

    def __init__(self, folder: Path, most: int = _COUNTER_LABELS) -> None:
        self._folder = folder
        self._most = most
        self._counts: dict[str, int] = {}
        self.runs: list[str] = []

    def add(self, labels: Iterable[str]) -> None:
        """Count one occurrence of each label."""
        for label in labels:
            self._counts[label] = self._counts.get(label, 0) + 1
        if len(self._counts) >= self._most:
            self.close()

    def close(self) -> None:
        """Spill what is left."""
        if not self._counts:
            return
        names = [label.encode() for label in self._counts]
        records = np.empty(len(names), RECORD)
        records["hash"], records["check"] = hash_names(names)
        records["count"] = list(self._counts.values())
        records["length"] = [len(name) for name in names]
        order = np.argsort(records["hash"], kind="stable")
        run = Run(self._folder, f"run-{len(self.runs):05d}")
        with new_run(run) as writer:
            writer.append(records[order], [names[place] for place in order])
        self.runs.append(run.name)
        self._counts.clear()


class RunWriter:
    """Appends records, ascending by hash, and their names to a new run; made by :func:`new_run`."""

    def __init__(self, records: BinaryIO, names: BinaryIO) -> None:
        self._records, self._names = records, names

    def append(self, records: NDArray[np.void], names: list[bytes]) -> None:
        """Add records of type ``RECORD`` and as many names."""
        self._records.write(records.tobytes())
        self._names.write(b"".join(names))


@contextmanager
def new_run(run: Run) -> Iterator[RunWriter]:
    """Write a run."""
    with open(run.records_path, "wb") as records, open(run.names_path, "wb") as names:
        yield RunWriter(records, names)


class RunReader:
    """Reads a run from front to back, ``block`` records ahead, for merging; made by :func:`open_run`."""

    def __init__(self, records: BinaryIO, names: BinaryIO, block: int) -> None:
        self._records, self._names = records, names
        self._block = block
        self._head = np.empty(0, RECORD)
        self._ended = False

    def fill(self) -> int:
        """Read ahead; returns how many records are at hand, 0 when the run is used up."""
        if not self._ended and (wanted := self._block - len(self._head)):
            more = read_records(self._records, wanted)
            self._ended = len(more) < wanted
            self._head = np.concatenate([self._head, more])
        return len(self._head)

    def safe_bound(self) -> np.uint64:
        """The hash up to which this run has been seen; the largest there is when all of it has."""
        return _MAX_HASH if self._ended else np.uint64(self._head["hash"][-1])

    def take(self, bound: np.uint64) -> tuple[NDArray[np.void], list[bytes]]:
        """Records with hash <= ``bound`` among those at hand, and their names."""
        count = int(np.searchsorted(self._head["hash"], bound, side="right"))
        records, self._head = self._head[:count], self._head[count:]
        ends = list(accumulate(records["length"].tolist(), initial=0))
        blob = self._names.read(ends[-1])
        return records, [blob[start:end] for start, end in pairwise(ends)]


@contextmanager
def open_run(run: Run, block: int) -> Iterator[RunReader]:
    """Read a run in pieces of ``block`` records."""
    with open(run.records_path, "rb") as records, open(run.names_path, "rb") as names:
        yield RunReader(records, names, block)


def read_records(stream: BinaryIO, count: int) -> NDArray[np.void]:
    """The next ``count`` records, or those that are left."""
    return np.frombuffer(stream.read(count * RECORD.itemsize), RECORD)
