"""Texts of the Extreme Classification Repository: one a line (``trn_X.txt``), the labels in a file beside.

A file that is not UTF-8 as a whole is read as Latin-1, in which some of the repository's files are written.
"""

from collections.abc import Iterator

from elmo_stream.data.readers.beside import pair_parts, read_labels
from elmo_stream.data.readers.instance import (
    Fields,
    Part,
    RawInstance,
    Source,
    make_instance,
    refusal,
)
from elmo_stream.data.readers.lines import count_lines, encoding_of, read_lines, strip_end


def split(source: Source, fields: Fields, part_bytes: int) -> list[Part]:
    """See :class:`elmo_stream.data.readers.Format`."""
    file = source.main
    lines = count_lines(file, 0, part_bytes)
    encoding = encoding_of(file)
    ends = [*(offset for offset, _ in lines.cuts[1:]), file.path.stat().st_size]
    parts = [
        Part(source, start, end, first_row=row, encoding=encoding)
        for (start, row), end in zip(lines.cuts, ends, strict=True)
        if start < end
    ]
    return pair_parts(source, fields, parts, lines.count)


def read(part: Part, fields: Fields) -> Iterator[RawInstance]:
    """See :class:`elmo_stream.data.readers.Format`."""
    file = part.source.main
    for (offset, line), labels in zip(read_lines(file, part.start, part.end), read_labels(part, fields), strict=False):
        try:
            yield make_instance(strip_end(line).decode(part.encoding).replace("\0", " "), labels)
        except ValueError as error:
            raise refusal(file, offset, str(error)) from error
