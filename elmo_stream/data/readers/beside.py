"""Labels in a file of their own, row by row beside texts or features.

Three kinds: sparse text lines ``id:1.0 ...`` below a header ``rows labels``, the same as a CSR matrix in an ``.npz``,
or label names between blanks on each line.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import repeat

from elmo_stream.data.readers.instance import Fields, InputFile, Part, Source, refusal
from elmo_stream.data.readers.label_list import LabelList
from elmo_stream.data.readers.label_values import LabelReader
from elmo_stream.data.readers.lines import count_lines, decode, find_lines, read_lines
from elmo_stream.data.readers.sparse import CsrMatrix, first_line, open_csr, parse_header, parse_rows
from elmo_stream.errors import UserError

_WHOLE_FILE = 1 << 62


def pair_parts(source: Source, fields: Fields, parts: Sequence[Part], rows: int) -> list[Part]:
    """Parts of the main file, completed by where their labels are; ``rows`` is the length of the main file.

    Raises:
        UserError: the labels do not fit the rows, or the list of names does not fit the labels.
    """
    file = source.labels
    if fields.label is None or file is None:
        return list(parts)
    if file.path.is_dir():
        matrix = open_csr(file)
        _check_count(source, rows, matrix.rows, f"{file.name}: the matrix has {matrix.rows} rows")
        starts, columns = [part.first_row for part in parts], matrix.columns
        starts.append(rows)
    else:
        begin, columns = _text_kind(source, file, rows)
        starts = find_lines(file, begin, [part.first_row for part in parts] + [rows])
    if columns:
        check_names(fields, columns, file)
    return [
        replace(part, label_start=first, label_end=last, label_columns=columns)
        for part, first, last in zip(parts, starts[:-1], starts[1:], strict=True)
    ]


def read_labels(part: Part, fields: Fields) -> Iterator[list[str]]:
    """The labels of each row of a part, without end: rows behind the last have none.

    Raises:
        UserError: a row cannot be read; names file and line.
    """
    file = part.source.labels
    if fields.label is None or file is None:
        return repeat([])
    reader = LabelReader(fields)
    if file.path.is_dir():
        return _from_matrix(open_csr(file), reader, part)
    return _from_text(file, reader, part)


def check_names(fields: Fields, columns: int, file: InputFile) -> None:
    """Refuse a list of names that has another length than there are labels."""
    if fields.names and len(LabelList(fields.names)) != columns:
        raise UserError(
            f"{file.name}: has {columns} labels, but the list of their names has {len(LabelList(fields.names))}; "
            "give the right one with --labels."
        )


def _text_kind(source: Source, file: InputFile, rows: int) -> tuple[int, int]:
    """Where the rows of a text file begin, and how many labels its header names; 0 for lines of names."""
    line, behind = first_line(file)
    header = parse_header(line)
    if header is not None and len(header) == 2:
        lines = count_lines(file, behind, _WHOLE_FILE)
        # The last row may be empty, and then a file may lack its line end.
        if header[0] == rows and lines.count in (rows, rows - 1) and not (lines.count < rows and lines.open_end):
            return behind, header[1]
        if header[0] == rows or lines.count + 1 != rows:
            says = f"the header names {header[0]} rows of {header[1]} labels and {lines.count} lines follow"
            _check_count(source, rows, -1, f"{file.name}:1: {says}")
    count = count_lines(file, 0, _WHOLE_FILE).count
    _check_count(source, rows, count, f"{file.name}: has {count} lines of labels")
    return 0, 0


def _check_count(source: Source, rows: int, found: int, says: str) -> None:
    if found != rows:
        raise UserError(f"{says}, but {source.main.name} has {rows} rows; they must be rows of one another.")


def _from_matrix(matrix: CsrMatrix, reader: LabelReader, part: Part) -> Iterator[list[str]]:
    for row in range(part.label_start, part.label_end):
        yield reader.ids(matrix.row(row).id_N.tolist(), part.label_columns)


def _from_text(file: InputFile, reader: LabelReader, part: Part) -> Iterator[list[str]]:
    if part.label_columns:
        lines = read_lines(file, part.label_start, part.label_end)
        for row in parse_rows(file, lines, part.label_columns):
            yield reader.ids(row.id_N.tolist(), part.label_columns)
    else:
        for offset, line in read_lines(file, part.label_start, part.label_end):
            try:
                yield reader.value(decode(line).split(), "the line")
            except ValueError as error:
                raise refusal(file, offset, str(error)) from error
    yield from repeat([])
