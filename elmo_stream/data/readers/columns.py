"""Rows of a table with named columns -> instances; what CSV and TSV share."""

import csv
from collections.abc import Sequence

from elmo_stream.data.readers.instance import Fields, RawInstance, make_instance
from elmo_stream.data.readers.label_values import LabelReader

csv.field_size_limit(1 << 26)


class Columns:
    """Instances out of the cells of a row.

    Raises:
        ValueError: a column is missing, or occurs twice.
    """

    def __init__(self, header: Sequence[str], fields: Fields) -> None:
        self._count = len(header)
        self._text = [column(header, name, "--text-field") for name in fields.text]
        self._label_name = fields.label
        self._label = None if fields.label is None else column(header, fields.label, "--label-field")
        self._labels_of = LabelReader(fields)

    def instance(self, row: Sequence[str]) -> RawInstance:
        """One row.

        Raises:
            ValueError: what is wrong with it.
        """
        if len(row) != self._count:
            raise ValueError(f"the row has {len(row)} fields where the header names {self._count}.")
        text = " ".join([row[place] for place in self._text])
        if self._label is None:
            return make_instance(text, ())
        return make_instance(text, self._labels_of.cell(row[self._label], f"field '{self._label_name}'"))


def column(header: Sequence[str], name: str, option: str) -> int:
    """Where a column is; ``option`` is what would choose another one."""
    if header.count(name) != 1:
        present = ", ".join(f"'{each[:60]}'" for each in header[:12])
        problem = "is missing" if name not in header else "occurs twice"
        raise ValueError(
            f"field '{name}' {problem} (the first line names {present}); choose another with {option}, "
            "or write a header line."
        )
    return header.index(name)
