"""Features as a sparse matrix that ``scipy.sparse.save_npz`` wrote, the labels in a file beside."""

from collections.abc import Iterator

from elmo_stream.data.readers.beside import pair_parts, read_labels
from elmo_stream.data.readers.instance import Fields, Part, RawInstance, Source, make_instance
from elmo_stream.data.readers.sparse import open_csr

_ENTRY_BYTES = 12


def split(source: Source, fields: Fields, part_bytes: int) -> list[Part]:
    """See :class:`elmo_stream.data.readers.Format`."""
    matrix = open_csr(source.main)
    entries = int(matrix.indptr[-1]) + matrix.rows
    step = max(1, matrix.rows * part_bytes // max(1, _ENTRY_BYTES * entries))
    parts = [
        Part(source, first, min(first + step, matrix.rows), first_row=first) for first in range(0, matrix.rows, step)
    ]
    return pair_parts(source, fields, parts, matrix.rows)


def read(part: Part, fields: Fields) -> Iterator[RawInstance]:
    """See :class:`elmo_stream.data.readers.Format`."""
    matrix = open_csr(part.source.main)
    for row, labels in zip(range(part.start, part.end), read_labels(part, fields), strict=False):
        yield make_instance("", labels, matrix.row(row))


def feature_count(source: Source) -> int:
    """How many features the matrix has."""
    return open_csr(source.main).columns
