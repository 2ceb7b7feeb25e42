"""Parquet tables: text columns, and a label column of strings, ids, or lists of either."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from elmo_stream.data.readers.instance import Fields, InputFile, Part, RawInstance, Source, make_instance
from elmo_stream.data.readers.label_values import LabelReader, kind_of
from elmo_stream.errors import UserError

_BATCH_ROWS = 1024


def split(source: Source, fields: Fields, part_bytes: int) -> list[Part]:
    """See :class:`elmo_stream.data.readers.Format`."""
    parts: list[Part] = []
    with _open(source.main) as table:
        begin = 0
        for number in range(table.metadata.num_row_groups):
            group = table.metadata.row_group(number)
            pieces = max(1, min(group.num_rows, group.total_byte_size // part_bytes))
            cuts = [begin + group.num_rows * piece // pieces for piece in range(pieces + 1)]
            parts += [Part(source, first, last, first_row=first) for first, last in pairwise(cuts) if first < last]
            begin += group.num_rows
    return parts


def read(part: Part, fields: Fields) -> Iterator[RawInstance]:
    """See :class:`elmo_stream.data.readers.Format`."""
    file = part.source.main
    labels_of = LabelReader(fields)
    names = [*fields.text, *([] if fields.label is None else [fields.label])]
    with _open(file) as table:
        _check_columns(file, table, names, fields)
        for row, values in _rows(file, table, part, names):
            try:
                yield _instance(values, fields, labels_of)
            except ValueError as error:
                raise UserError(f"{file.name}: row {row}: {error}") from error


def _instance(values: dict[str, Any], fields: Fields, labels_of: LabelReader) -> RawInstance:
    for name in fields.text:
        if not isinstance(values[name], str):
            raise ValueError(f"field '{name}' is {kind_of(values[name])}; expected a string.")
    text = " ".join([values[name] for name in fields.text])
    if fields.label is None:
        return make_instance(text, ())
    return make_instance(text, labels_of.value(values[fields.label], f"field '{fields.label}'"))


def _open(file: InputFile) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"{file.name}: reading Parquet needs pyarrow: pip install pyarrow.") from error
    try:
        return pyarrow.parquet.ParquetFile(file.path)
    except (pyarrow.ArrowException, OSError) as error:
        raise _refusal(file, "not a whole Parquet file", error) from error


def _check_columns(file: InputFile, table: Any, names: list[str], fields: Fields) -> None:
    import pyarrow

    for name in names:
        if table.schema_arrow.names.count(name) != 1:
            problem = "is missing" if name not in table.schema_arrow.names else "occurs twice"
            present = ", ".join(f"'{each[:60]}'" for each in table.schema_arrow.names[:12])
            option = "--label-field" if name == fields.label else "--text-field"
            raise UserError(f"{file.name}: field '{name}' {problem} (fields: {present}); choose another with {option}.")
        kind = table.schema_arrow.field(name).type
        if name == fields.label and (pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind)):
            kind = kind.value_type
        if pyarrow.types.is_dictionary(kind):
            kind = kind.value_type
        string = pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)
        if not (string or (name == fields.label and pyarrow.types.is_integer(kind))):
            expected = "strings, ids or lists of them" if name == fields.label else "strings"
            raise UserError(f"{file.name}: field '{name}' holds {kind}; expected {expected}.")


def _rows(file: InputFile, table: Any, part: Part, names: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(row, values by name) of a part, reading the row groups that hold it."""
    import pyarrow

    groups: list[int] = []
    row = begin = 0
    for number in range(table.metadata.num_row_groups):
        end = begin + table.metadata.row_group(number).num_rows
        if begin < part.end and end > part.start:
            row = row if groups else begin
            groups.append(number)
        begin = end
    try:
        for batch in table.iter_batches(_BATCH_ROWS, row_groups=groups, columns=names, use_threads=False):
            if row >= part.end:
                return
            skip = max(0, part.start - row)
            wanted = batch.slice(skip, max(0, part.end - row - skip))
            columns = {name: wanted.column(name).to_pylist() for name in names}
            for place in range(wanted.num_rows):
                yield row + skip + place, {name: columns[name][place] for name in names}
            row += batch.num_rows
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise _refusal(file, f"row {row} or one behind it cannot be read", error) from error


def _refusal(file: InputFile, what: str, error: Exception) -> Exception:
    """Of the disk, which has a number, or of the file's bytes."""
    if isinstance(error, OSError) and error.errno:
        return OSError(error.errno, error.strerror, str(file.path))
    short = (str(error).strip().splitlines() or [type(error).__name__])[0][:200].rstrip(".")
    return UserError(f"{file.name}: {what} ({short}).")
