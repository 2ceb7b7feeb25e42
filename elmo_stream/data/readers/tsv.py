"""TSV with a header: a row a line, cells between tabs.

A cell that is quoted as in CSV is unquoted, as table programs write it; any other quote is a quote. Cells hold no tab
and no line end.
"""

from collections.abc import Iterator

from elmo_stream.data.readers.columns import Columns
from elmo_stream.data.readers.instance import Fields, InputFile, Part, RawInstance, Source, refusal
from elmo_stream.data.readers.lines import BOM, decode, read_instances, read_lines, split_lines
from elmo_stream.files import reading


def split(source: Source, fields: Fields, part_bytes: int) -> list[Part]:
    """See :class:`elmo_stream.data.readers.Format`."""
    return split_lines(source, part_bytes, start=_header(source.main)[1])


def read(part: Part, fields: Fields) -> Iterator[RawInstance]:
    """See :class:`elmo_stream.data.readers.Format`."""
    file = part.source.main
    try:
        columns = Columns(_header(file)[0], fields)
    except ValueError as error:
        raise refusal(file, 0, str(error)) from error
    return read_instances(part, lambda line: columns.instance(_cells(decode(line))))


def head_rows(head: bytes) -> list[list[str]]:
    """The first rows of a file, for a look at their columns: whatever is whole in ``head``."""
    return [_cells(line.rstrip("\r")) for line in head.decode("utf-8", "replace").split("\n")[:-1]]


def _header(file: InputFile) -> tuple[list[str], int]:
    """Names of the columns, and where the rows begin."""
    for offset, line in read_lines(file, 0, file.path.stat().st_size):
        try:
            names = [name.strip() for name in _cells(decode(line))]
        except ValueError as error:
            raise refusal(file, offset, str(error)) from error
        with reading(file.path) as stream:
            return names, len(line) + (len(BOM) if stream.read(len(BOM)) == BOM else 0)
    raise refusal(file, 0, "the file is empty; expected a header line with the names of the fields.")


def _cells(line: str) -> list[str]:
    return [_unquoted(cell) for cell in line.split("\t")]


def _unquoted(cell: str) -> str:
    inside = cell[1:-1]
    quoted = len(cell) > 1 and cell[0] == cell[-1] == '"' and '"' not in inside.replace('""', "")
    return inside.replace('""', '"') if quoted else cell
