"""CSV (RFC 4180) with a header: a record ends at a line end outside quotes, so that texts may hold line ends.

The delimiter is a comma, or a semicolon where the header has semicolons and no comma.
"""

import csv
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from elmo_stream.data.readers.columns import Columns
from elmo_stream.data.readers.instance import (
    MAX_LINE_BYTES,
    SCAN_BYTES,
    Fields,
    InputFile,
    Part,
    RawInstance,
    Source,
    refusal,
)
from elmo_stream.data.readers.lines import TOO_LONG, check_rest_blank, decode, read_lines
from elmo_stream.files import reading

_QUOTE, _NEWLINE = ord('"'), ord("\n")
_OPEN = "a quote is opened and not closed; write a quote inside a field twice, in a field within quotes."


def split(source: Source, fields: Fields, part_bytes: int) -> list[Part]:
    """See :class:`elmo_stream.data.readers.Format`.

    A byte is outside quotes exactly when an even number of quotes stands before it, so one scan finds all cuts.
    """
    begin = _header(source.main).end
    size = source.main.path.stat().st_size
    starts, quotes, offset = [begin], 0, begin
    with reading(source.main.path) as stream:
        stream.seek(begin)
        while piece := stream.read(SCAN_BYTES):
            codes = np.frombuffer(piece, np.uint8)
            quote_places, line_ends = np.flatnonzero(codes == _QUOTE), np.flatnonzero(codes == _NEWLINE)
            before = quotes + np.searchsorted(quote_places, line_ends)
            for end in (line_ends[before % 2 == 0] + (offset + 1)).tolist():
                if end - starts[-1] >= part_bytes:
                    starts.append(end)
            quotes += len(quote_places)
            offset += len(piece)
    ends = [*starts[1:], size]
    return [Part(source, first, last) for first, last in zip(starts, ends, strict=True) if first < last]


def read(part: Part, fields: Fields) -> Iterator[RawInstance]:
    """See :class:`elmo_stream.data.readers.Format`."""
    file = part.source.main
    header = _header(file)
    try:
        columns = Columns(header.names, fields)
    except ValueError as error:
        raise refusal(file, 0, str(error)) from error
    for offset, record in _records(file, part.start, part.end):
        if not record.strip():
            check_rest_blank(file, offset)
            return
        try:
            instance = columns.instance(_cells(record, header.delimiter))
        except ValueError as error:
            raise refusal(file, offset, str(error)) from error
        yield instance


def head_rows(head: bytes) -> list[list[str]]:
    """The first rows of a file, for a look at their columns: whatever is whole in ``head``."""
    lines = [f"{line}\n" for line in head.decode("utf-8", "replace").split("\n")[:-1]]
    delimiter = _delimiter(lines[0]) if lines else ","
    try:
        return list(csv.reader(lines, delimiter=delimiter))
    except csv.Error:
        return []


@dataclass(frozen=True)
class _Header:
    names: list[str]
    delimiter: str
    end: int


def _header(file: InputFile) -> _Header:
    for offset, record in _records(file, 0, file.path.stat().st_size):
        try:
            text = decode(record)
            delimiter = _delimiter(text)
            names = [name.strip() for name in _cells(record, delimiter)]
        except ValueError as error:
            raise refusal(file, offset, str(error)) from error
        with reading(file.path) as stream:
            bom = 3 if stream.read(3) == b"\xef\xbb\xbf" else 0
        return _Header(names, delimiter, bom + len(record))
    raise refusal(file, 0, "the file is empty; expected a header line with the names of the fields.")


def _delimiter(header: str) -> str:
    return ";" if ";" in header and "," not in header else ","


def _records(file: InputFile, start: int, end: int) -> Iterator[tuple[int, bytes]]:
    """(offset, bytes with their line end) of records."""
    lines: list[bytes] = []
    begun, quotes, length = start, 0, 0
    for offset, line in read_lines(file, start, end):
        if not lines:
            begun = offset
        lines.append(line)
        quotes += line.count(b'"')
        length += len(line)
        if length > MAX_LINE_BYTES:
            raise refusal(file, begun, _OPEN if quotes % 2 else TOO_LONG)
        if quotes % 2 == 0:
            yield begun, lines[0] if len(lines) == 1 else b"".join(lines)
            lines, quotes, length = [], 0, 0
    if lines:
        raise refusal(file, begun, _OPEN)


def _cells(record: bytes, delimiter: str) -> list[str]:
    try:
        rows = list(csv.reader([decode(record)], delimiter=delimiter, strict=True))
    except csv.Error as error:
        raise ValueError(f"not valid CSV ({error}); {_OPEN}") from error
    if len(rows) != 1:
        raise ValueError("a line end stands in a field without quotes; write such fields within quotes.")
    return rows[0]
