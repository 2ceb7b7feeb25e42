"""Sparse rows: text lines ``index:value ...`` below a header ``rows columns``, and CSR arrays out of an ``.npz``."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from elmo_stream.data.arrays import map_array
from elmo_stream.data.readers.instance import Features, InputFile, refusal
from elmo_stream.data.readers.lines import read_lines, strip_end
from elmo_stream.errors import CorruptError, UserError
from elmo_stream.files import reading

MAX_COLUMNS = 2**31 - 1
_HEADER = re.compile(rb"\s*(\d{1,15})\s+(\d{1,15})(?:\s+(\d{1,15}))?\s*")


def parse_header(line: bytes) -> tuple[int, ...] | None:
    """The two or three numbers of a header, or None when the line is no header."""
    match = _HEADER.fullmatch(line)
    return tuple(int(number) for number in match.groups() if number is not None) if match else None


def first_line(file: InputFile) -> tuple[bytes, int]:
    """The first line of a file, and where the second begins."""
    with reading(file.path) as stream:
        bom = 3 if stream.read(3) == b"\xef\xbb\xbf" else 0
    for _, line in read_lines(file, 0, file.path.stat().st_size):
        return line, bom + len(line)
    return b"", 0


def parse_row(text: bytes, columns: int) -> Features:
    """Entries ``index:value`` between blanks; an entry without a value counts 1, repeated ones are summed.

    A comment behind ``#`` and a leading ``qid:n`` are left out, and so are values of 0.

    Raises:
        ValueError: an entry is malformed, out of range, or not finite.
    """
    entries = text.partition(b"#")[0].split()
    if entries and entries[0].startswith(b"qid:"):
        del entries[0]
    ids, weights = np.empty(len(entries), np.int64), np.empty(len(entries), np.float64)
    for place, entry in enumerate(entries):
        index, colon, value = entry.partition(b":")
        try:
            ids[place], weights[place] = int(index), float(value) if colon else 1.0
        except (ValueError, OverflowError) as error:
            raise ValueError(f"entry {entry[:40].decode(errors='replace')!r} is not 'index:value'.") from error
    return make_features(ids, weights, columns)


def make_features(ids: NDArray[np.int64], weights: NDArray[np.float64], columns: int) -> Features:
    """A sparse vector out of entries in any order.

    Raises:
        ValueError: an index is not in [0, columns), or a value is not finite in float32.
    """
    if len(ids) and not 0 <= ids.min() <= ids.max() < columns:
        wrong = int(ids[(ids < 0) | (ids >= columns)][0])
        raise ValueError(f"index {wrong} is not in 0...{columns - 1}, as the header says.")
    if np.any(ids[1:] <= ids[:-1]):
        ids, inverse = np.unique(ids, return_inverse=True)
        weights = np.asarray(np.bincount(inverse, weights, minlength=len(ids)), np.float64)
    kept = weights != 0
    with np.errstate(over="ignore"):
        values = weights[kept].astype(np.float32)
    if not np.isfinite(values).all():
        raise ValueError("a value is not finite; expected numbers within the range of float32.")
    return Features(ids[kept], values)


@dataclass(frozen=True)
class CsrMatrix:
    """A sparse matrix, its arrays mapped from the folder that ``unpack`` filled."""

    name: str
    columns: int
    data: NDArray[np.generic]
    indices: NDArray[np.signedinteger]
    indptr: NDArray[np.signedinteger]

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.indptr) - 1

    def row(self, number: int) -> Features:
        """One row; raises ``UserError`` when it is malformed."""
        span = slice(int(self.indptr[number]), int(self.indptr[number + 1]))
        try:
            return make_features(self.indices[span].astype(np.int64), self.data[span].astype(np.float64), self.columns)
        except ValueError as error:
            raise UserError(f"{self.name}: row {number}: {error}") from error


def open_csr(file: InputFile) -> CsrMatrix:
    """Map a matrix and check that its arrays fit together.

    Raises:
        UserError: it is no matrix in CSR form.
    """
    arrays = {}
    for key in ("data", "indices", "indptr", "shape", "format"):
        try:
            arrays[key] = map_array(file.path / f"{key}.npy")
        except (CorruptError, OSError) as error:
            raise UserError(f"{file.name}: array '{key}' cannot be read ({error.__cause__ or error}).") from error
    kind = arrays["format"]
    if kind.ndim or kind.dtype.kind not in "SU" or kind.item() not in (b"csr", "csr"):
        raise UserError(f"{file.name}: holds a matrix that is not in CSR form; convert it with scipy's tocsr().")
    shape, data, indices, indptr = (arrays[key] for key in ("shape", "data", "indices", "indptr"))
    if any(array.ndim != 1 or array.dtype.kind not in "iu" for array in (shape, indices, indptr)) or len(shape) != 2:
        raise UserError(f"{file.name}: shape, indices and indptr are not lists of whole numbers.")
    rows, columns = (int(size) for size in shape)
    if not 0 < columns <= MAX_COLUMNS or rows < 0:
        raise UserError(f"{file.name}: a shape of {rows} x {columns} is out of range.")
    if data.ndim != 1 or data.dtype.kind not in "biuf" or len(data) != len(indices):
        raise UserError(f"{file.name}: holds {len(indices)} indices and {data.size} values of type {data.dtype}.")
    if len(indptr) != rows + 1 or int(indptr[0]) != 0 or int(indptr[-1]) != len(indices):
        raise UserError(f"{file.name}: indptr does not lead from 0 to {len(indices)} in {rows} rows.")
    if np.any(indptr[1:] < indptr[:-1]):
        row = int(np.flatnonzero(indptr[1:] < indptr[:-1])[0])
        raise UserError(f"{file.name}: row {row}: indptr falls; the matrix is damaged.")
    return CsrMatrix(str(file.name), columns, data, indices, indptr)


def parse_rows(file: InputFile, lines: Iterable[tuple[int, bytes]], columns: int) -> Iterator[Features]:
    """The rows of some lines with their offsets; raises ``UserError`` with file and line."""
    for offset, line in lines:
        try:
            yield parse_row(strip_end(line), columns)
        except ValueError as error:
            raise refusal(file, offset, str(error)) from error
