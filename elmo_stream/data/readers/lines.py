"""Lines of a file, in parts that many processes can read at once.

A line is what ends in byte 0x0A and nothing else: the Unicode line breaks that may occur inside a title do not
shift the rows.
"""

import codecs
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from elmo_stream.data.readers.instance import (
    MAX_LINE_BYTES,
    SCAN_BYTES,
    InputFile,
    Part,
    RawInstance,
    Source,
    refusal,
)
from elmo_stream.files import reading

BOM = b"\xef\xbb\xbf"
READ_AS_LATIN_1 = "is not UTF-8 as a whole, and so is read as Latin-1"
TOO_LONG = f"the line is longer than {MAX_LINE_BYTES >> 20} MiB; expected one instance a line."


def split_lines(source: Source, part_bytes: int, start: int = 0) -> list[Part]:
    """Cut a file at line ends, from byte ``start`` on, into parts of about ``part_bytes`` bytes.

    Raises:
        UserError: a line is longer than 64 MiB.
    """
    file = source.main
    size = file.path.stat().st_size
    starts = [start]
    for target in range(start + part_bytes, size, part_bytes):
        if target > starts[-1]:
            starts.append(_line_end(file, target - 1))
    ends = [*starts[1:], size]
    return [Part(source, begin, end) for begin, end in zip(starts, ends, strict=True) if begin < end]


@dataclass(frozen=True)
class Lines:
    """How many lines a file has from some byte on, and cuts of (offset, line) that begin at (start, 0)."""

    count: int
    cuts: list[tuple[int, int]]
    open_end: bool


def count_lines(file: InputFile, start: int, part_bytes: int) -> Lines:
    """Count the lines from byte ``start`` on, cutting them into parts of about ``part_bytes`` bytes.

    ``open_end`` says that the last line does not end in a line end.
    """
    count, cuts, end = 0, [(start, 0)], start
    for ends in _line_ends(file, start):
        while (place := int(np.searchsorted(ends, cuts[-1][0] + part_bytes))) < len(ends):
            cuts.append((int(ends[place]), count + place + 1))
        count += len(ends)
        end = int(ends[-1])
    open_end = end < file.path.stat().st_size
    return Lines(count + open_end, cuts, open_end)


def find_lines(file: InputFile, start: int, lines: Sequence[int]) -> list[int]:
    """Where lines begin, numbered from 0 at byte ``start`` and given in ascending order; past the end: the size."""
    places = [start if line == 0 else -1 for line in lines]
    count = 0
    for ends in _line_ends(file, start):
        for number, line in enumerate(lines):
            if count < line <= count + len(ends):
                places[number] = int(ends[line - count - 1])
        count += len(ends)
    size = file.path.stat().st_size
    return [size if place < 0 else place for place in places]


def _line_ends(file: InputFile, start: int) -> Iterator[NDArray[np.int64]]:
    """Offsets behind the line ends from byte ``start`` on, in blocks; refuses a line that is too long."""
    offset = last = start
    with reading(file.path) as stream:
        stream.seek(start)
        while piece := stream.read(SCAN_BYTES):
            ends = np.flatnonzero(np.frombuffer(piece, np.uint8) == ord("\n")) + (offset + 1)
            if len(ends):
                yield ends
                last = int(ends[-1])
            offset += len(piece)
            if offset - last > MAX_LINE_BYTES:
                raise refusal(file, last, TOO_LONG)


def read_lines(file: InputFile, start: int, end: int) -> Iterator[tuple[int, bytes]]:
    """(offset, line with its end) of the lines from byte ``start`` to ``end``; a byte order mark is left out.

    Raises:
        UserError: a line is longer than 64 MiB.
    """
    with reading(file.path) as stream:
        offset = start
        stream.seek(offset)
        while offset < end:
            line = stream.readline(MAX_LINE_BYTES + 1)
            if len(line) > MAX_LINE_BYTES:
                raise refusal(file, offset, TOO_LONG)
            if not line:
                return  # the file became shorter; the converter compares its size in the end
            yield offset, line.removeprefix(BOM) if offset == 0 else line
            offset += len(line)


def read_instances(part: Part, parse: Callable[[bytes], RawInstance]) -> Iterator[RawInstance]:
    """The instances of a part whose file has one a line; blank lines are allowed at the end of the file only.

    Raises:
        UserError: ``file:line: what is wrong, what was expected``.
    """
    file = part.source.main
    for offset, line in read_lines(file, part.start, part.end):
        if not line.strip():
            check_rest_blank(file, offset)
            return
        try:
            yield parse(line)
        except ValueError as error:
            raise refusal(file, offset, str(error)) from error


def check_rest_blank(file: InputFile, offset: int) -> None:
    """Refuse a blank line at ``offset`` that has something behind it."""
    with reading(file.path) as stream:
        stream.seek(offset)
        while piece := stream.read(SCAN_BYTES):
            if piece.strip():
                raise refusal(file, offset, "the line is blank; blank lines are allowed at the end of the file only.")


def decode(line: bytes) -> str:
    """A line without its end as text.

    Raises:
        ValueError: it is not UTF-8.
    """
    try:
        return strip_end(line).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"not UTF-8 (byte 0x{line[error.start]:02x} at byte {error.start + 1} of the line)."
        ) from error


def encoding_of(file: InputFile) -> str:
    """UTF-8 where the whole file is that, else Latin-1, in which some of the repository's files are written."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    with reading(file.path) as stream:
        try:
            while piece := stream.read(SCAN_BYTES):
                decoder.decode(piece)
            decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            return "latin-1"
    return "utf-8"


def strip_end(line: bytes) -> bytes:
    """A line without ``\\n`` or ``\\r\\n`` at its end."""
    return line.removesuffix(b"\n").removesuffix(b"\r")


def _line_end(file: InputFile, start: int) -> int:
    """Offset just behind the first line end at or behind ``start``."""
    with reading(file.path) as stream:
        stream.seek(start)
        offset = start
        while piece := stream.read(SCAN_BYTES):
            if (found := piece.find(b"\n")) >= 0:
                return offset + found + 1
            offset += len(piece)
            if offset - start > MAX_LINE_BYTES:
                raise refusal(file, start, TOO_LONG)
    return offset
