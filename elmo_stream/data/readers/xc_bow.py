"""Bags of words of the Extreme Classification Repository, with their weights.

Either ``instances features labels`` heads lines ``label,label feature:value ...``, of which one without labels begins
with a blank; or ``instances features`` heads lines ``feature:value ...``, and the labels are in a file beside.
"""

from collections.abc import Iterator

from elmo_stream.data.readers.beside import check_names, pair_parts, read_labels
from elmo_stream.data.readers.instance import Fields, InputFile, Part, RawInstance, Source, make_instance, refusal
from elmo_stream.data.readers.label_values import LabelReader
from elmo_stream.data.readers.lines import count_lines, find_lines, read_lines, strip_end
from elmo_stream.data.readers.sparse import MAX_COLUMNS, first_line, parse_header, parse_row, parse_rows
from elmo_stream.errors import UserError


def split(source: Source, fields: Fields, part_bytes: int) -> list[Part]:
    """See :class:`elmo_stream.data.readers.Format`."""
    file = source.main
    header, begin = _header(file)
    lines = count_lines(file, begin, part_bytes)
    rows = header[0]
    # The last row may be empty, and then the file may lack its line end.
    if lines.count < rows - 1 or (lines.count == rows - 1 and lines.open_end):
        raise UserError(
            f"{file.name}:1: the header names {rows} rows, but {lines.count} lines follow; the file was cut."
        )
    (end,) = find_lines(file, begin, [rows])
    for offset, line in read_lines(file, end, file.path.stat().st_size):
        if line.strip():
            raise refusal(file, offset, f"the header names {rows} rows, and this is a row more.")
    cuts = [cut for cut in lines.cuts if cut[1] < rows]
    ends = [*(offset for offset, _ in cuts[1:]), end][: len(cuts)]
    parts = [
        Part(source, start, last, first_row=row) for (start, row), last in zip(cuts, ends, strict=True) if start < last
    ]
    if lines.count < rows:
        parts.append(Part(source, end, end, first_row=rows - 1))
    if len(header) == 3:
        check_names(fields, header[2], file)
        return parts
    return pair_parts(source, fields, parts, rows)


def read(part: Part, fields: Fields) -> Iterator[RawInstance]:
    """See :class:`elmo_stream.data.readers.Format`; a part without bytes is an empty row that has no line end."""
    file = part.source.main
    header = _header(file)[0]
    lines = read_lines(file, part.start, part.end) if part.start < part.end else [(part.start, b"")]
    if len(header) == 2:
        rows = parse_rows(file, lines, header[1])
        for row, labels in zip(rows, read_labels(part, fields), strict=False):
            yield make_instance("", labels, row)
        return
    reader = LabelReader(fields)
    for offset, line in lines:
        try:
            # Only the first blank parts labels from features: stripping the line would shift them.
            ids, _, entries = strip_end(line).partition(b" ")
            names = [] if fields.label is None else reader.ids(_ids(ids), header[2])
            yield make_instance("", names, parse_row(entries, header[1]))
        except ValueError as error:
            raise refusal(file, offset, str(error)) from error


def feature_count(source: Source) -> int:
    """How many features the header names."""
    return _header(source.main)[0][1]


def _header(file: InputFile) -> tuple[tuple[int, ...], int]:
    line, begin = first_line(file)
    header = parse_header(line)
    if header is None or not 0 < header[1] <= MAX_COLUMNS:
        raise UserError(
            f"{file.name}:1: not a header; expected 'instances features labels', such as 4880 1836 159, or "
            "'instances features' with the labels in a file beside."
        )
    return header, begin


def _ids(labels: bytes) -> list[int]:
    try:
        return [int(label) for label in labels.split(b",")] if labels else []
    except ValueError as error:
        raise ValueError(
            f"begins with {labels[:40].decode(errors='replace')!r}; expected label ids such as 3,17, or a blank "
            "where a row has no label."
        ) from error
