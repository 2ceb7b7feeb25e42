"""Building the label map in bounded memory, for more labels than a dictionary could hold.

Every worker counts into a bounded dictionary and spills it as runs. Runs are merged, at most 64 at a time,
reading each from front to back. The last run alone decides the ids, in about 28 bytes a label; whatever is in the order
of the runs or of the ids is written as it comes, since pages of a mapped file would count as memory until they are
written back.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from elmo_stream.data.arrays import save_array
from elmo_stream.data.index import MAX_LABELS
from elmo_stream.data.label_runs import RECORD, Run, new_run, open_run, read_records
from elmo_stream.data.labels import (
    CHECKS_FILE,
    FREQUENCY_FILE,
    HASHES_FILE,
    IDS_FILE,
    NAMES_FILE,
    OFFSETS_FILE,
    TEXT_OFFSETS_FILE,
    TEXTS_FILE,
    LabelMap,
)
from elmo_stream.data.readers.label_list import LabelList
from elmo_stream.errors import UserError

_FAN_IN = 64
_BLOCK = 1 << 16


def build_labels(runs: Sequence[Run], scratch: Path, names_folder: Path, lookup_folder: Path) -> int:
    """Merge runs and write the labels of a store and the lookup of the converter.

    Args:
        runs: what the counters spilled; at least one.
        scratch: folder for intermediate runs.
        names_folder: receives ``names.bin``, ``offsets.npy`` and ``frequency.npy``.
        lookup_folder: receives ``hashes.npy``, ``checks.npy`` and ``ids.npy``.

    Returns:
        The number of labels.

    Raises:
        UserError: two labels share a 64-bit hash, or there are too many labels or occurrences.
    """
    run = _merge_all(runs, scratch)
    total = run.records_path.stat().st_size // RECORD.itemsize
    if total > MAX_LABELS:
        raise UserError(f"the training data has {total} distinct labels; at most {MAX_LABELS} fit into 32-bit ids.")
    frequency = np.empty(total, np.uint32)
    starts = np.zeros(total + 1, np.int64)
    place = 0
    with (
        _new_array(lookup_folder / HASHES_FILE, "<u8", total) as hashes,
        _new_array(lookup_folder / CHECKS_FILE, "<u8", total) as checks,
    ):
        for records in _read_blocks(run):
            block = slice(place, place + len(records))
            if int(records["count"].max()) >= 2**32:
                raise UserError(
                    "a label has more than 2^32 - 1 training instances, which its stored frequency cannot hold."
                )
            hashes.write(records["hash"].tobytes())
            checks.write(records["check"].tobytes())
            frequency[block] = records["count"]
            starts[place + 1 : block.stop + 1] = starts[place] + np.cumsum(records["length"], dtype=np.int64)
            place = block.stop
    # Records come by ascending hash, so a stable sort by falling frequency breaks ties by hash.
    order = np.argsort(~frequency, kind="stable")
    ids = np.empty(total, np.uint32)
    for first in range(0, total, _BLOCK):
        ids[order[first : first + _BLOCK]] = np.arange(first, min(first + _BLOCK, total), dtype=np.uint32)
    save_array(lookup_folder / IDS_FILE, ids)
    del ids
    _write_names(run, order, starts, frequency, names_folder)
    run.remove()
    return total


def write_texts(given: LabelList, label_map: LabelMap, folder: Path) -> None:
    """Write the texts of the labels of a store in the order of their ids: ``texts.bin`` and ``text_offsets.npy``.

    Args:
        given: the list of labels of the input, which knows names and texts by the ids of the input.
        label_map: from names to the ids of the store.
    """
    place = np.full(len(label_map), -1, np.int64)
    for first in range(0, len(given), _BLOCK):
        ids = np.arange(first, min(first + _BLOCK, len(given)))
        new_ids = label_map.lookup(given[ids.tolist()])
        place[new_ids[new_ids >= 0]] = ids[new_ids >= 0]
    written = np.zeros(1, np.int64)
    with (
        open(folder / TEXTS_FILE, "wb") as texts,
        _new_array(folder / TEXT_OFFSETS_FILE, "<i8", len(place) + 1) as offsets,
    ):
        offsets.write(written.tobytes())
        for first in range(0, len(place), _BLOCK):
            rows = place[first : first + _BLOCK].tolist()
            lengths = [texts.write(given.text(row) if row >= 0 else b"") for row in rows]
            written = written[-1] + np.cumsum(lengths, dtype=np.int64)
            offsets.write(written.tobytes())


def _write_names(
    run: Run, order: NDArray[np.int64], starts: NDArray[np.int64], frequency: NDArray[np.uint32], folder: Path
) -> None:
    total = len(order)
    written = np.zeros(1, np.int64)
    with (
        open(run.names_path, "rb", buffering=0) as names,
        open(folder / NAMES_FILE, "wb") as sorted_names,
        _new_array(folder / OFFSETS_FILE, "<i8", total + 1) as offsets,
        _new_array(folder / FREQUENCY_FILE, "<u4", total) as frequencies,
    ):
        offsets.write(written.tobytes())
        for first in range(0, total, _BLOCK):
            places = order[first : first + _BLOCK]
            begin, end = starts[places], starts[places + 1]
            frequencies.write(frequency[places].tobytes())
            written = written[-1] + np.cumsum(end - begin)
            offsets.write(written.tobytes())
            for at, length in zip(begin.tolist(), (end - begin).tolist(), strict=True):
                names.seek(at)
                sorted_names.write(names.read(length))


def _merge_all(runs: Sequence[Run], scratch: Path) -> Run:
    """One run out of all; intermediate runs are removed once they are merged, the given ones are kept."""
    level, given = list(runs), set(runs)
    number = 0
    while len(level) > 1 or level[0] in given:
        merged = []
        for first in range(0, len(level), _FAN_IN):
            group = level[first : first + _FAN_IN]
            merged.append(Run(scratch, f"merged-{number:05d}"))
            number += 1
            _merge(group, merged[-1])
            for run in group:
                if run not in given:
                    run.remove()
        level = merged
    return level[0]


def _merge(runs: Sequence[Run], target: Run) -> None:
    with ExitStack() as files:
        writer = files.enter_context(new_run(target))
        readers = [files.enter_context(open_run(run, max(1, _BLOCK // len(runs)))) for run in runs]
        while sum(reader.fill() for reader in readers):
            bound = min(reader.safe_bound() for reader in readers)
            taken = [reader.take(bound) for reader in readers]
            names = [name for _, part in taken for name in part]
            writer.append(*_combine(np.concatenate([records for records, _ in taken]), names))


def _combine(records: NDArray[np.void], names: list[bytes]) -> tuple[NDArray[np.void], list[bytes]]:
    """Sort by hash and add up the counts of equal labels."""
    order = np.argsort(records["hash"], kind="stable")
    records = records[order]
    same = records["hash"][1:] == records["hash"][:-1]
    clash = np.flatnonzero(same & (records["check"][1:] != records["check"][:-1]))
    if len(clash):
        one, other = (names[order[clash[0] + step]].decode() for step in (0, 1))
        raise UserError(f"the labels {one!r} and {other!r} share a 64-bit hash; rename one of them.")
    firsts = np.flatnonzero(np.concatenate(([True], ~same)))
    combined = records[firsts]
    combined["count"] = np.add.reduceat(records["count"], firsts)
    return combined, [names[place] for place in order[firsts].tolist()]


def _read_blocks(run: Run) -> Iterator[NDArray[np.void]]:
    with open(run.records_path, "rb") as stream:
        while len(records := read_records(stream, _BLOCK)):
            yield records


@contextmanager
def _new_array(path: Path, dtype: str, length: int) -> Iterator[BinaryIO]:
    """A new ``.npy`` file of as many values, to which the caller writes their bytes."""
    with open(path, "wb") as stream:
        np.lib.format.write_array_header_1_0(stream, {"descr": dtype, "fortran_order": False, "shape": (length,)})
        yield stream
