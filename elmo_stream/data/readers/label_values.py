"""Labels as users write them: a string, an id, a list of either, or a cell of a table."""

import json
from collections.abc import Sequence
from typing import Any

from elmo_stream.data.readers.instance import Fields
from elmo_stream.data.readers.label_list import LabelList

SEPARATORS = (";", "|", ",")
_MAX_ID_DIGITS = 18


class LabelReader:
    """Label names out of values, by the separator and the list of names that the fields hold."""

    def __init__(self, fields: Fields) -> None:
        self._separator = fields.separator
        self._names = LabelList(fields.names) if fields.names else None

    def value(self, value: Any, where: str) -> list[str]:
        """Names out of a string, an id, or a list of either.

        Raises:
            ValueError: it is something else, or an id that has no name.
        """
        if isinstance(value, str):
            value = self._pieces(value)
        elif type(value) is int:
            value = [value]
        if not isinstance(value, list):
            raise ValueError(f"{where} is {kind_of(value)}; expected a list of strings or ids.")
        kinds = set(map(type, value))
        if kinds == {int}:
            return self.ids(value)
        if kinds - {str}:
            place, label = next((place, one) for place, one in enumerate(value, start=1) if type(one) is not str)
            raise ValueError(
                f"label {place} in {where} is {kind_of(label)}; expected a string, as the others, or ids only."
            )
        return value if self._names is None else self.ids([parse_id(label, where) for label in value])

    def cell(self, cell: str, where: str) -> list[str]:
        """Names out of a cell: empty for none, a JSON list, or strings between separators."""
        cell = cell.strip()
        if not cell:
            return []
        if cell.startswith("["):
            try:
                return self.value(json.loads(cell), where)
            except (json.JSONDecodeError, RecursionError) as error:
                raise ValueError(f"{where} begins like a JSON list but is none ({error}).") from error
        return self.value(self._pieces(cell), where)

    def ids(self, ids: Sequence[int], count: int | None = None) -> list[str]:
        """Names of ids, which must be below ``count``, or else below the length of the list of names.

        Raises:
            ValueError: an id is out of range.
        """
        limit = count if count is not None else len(self._names) if self._names else None
        for label in ids:
            if label < 0 or (limit is not None and label >= limit):
                span = "0 or above" if limit is None else f"in 0...{limit - 1}"
                raise ValueError(f"label id {label} is not {span}.")
        return [str(label) for label in ids] if self._names is None else self._names[ids]

    def _pieces(self, text: str) -> list[str]:
        if self._separator is None:
            return [text]
        return [piece.strip() for piece in text.split(None if self._separator == " " else self._separator)]


def parse_id(text: str, where: str) -> int:
    """A label id that is written as a string."""
    digits = text.strip()
    if not (digits.isascii() and digits.isdigit() and len(digits) <= _MAX_ID_DIGITS):
        raise ValueError(f"{where} holds {text[:40]!r} where an id was expected, since --labels gives names for ids.")
    return int(digits)


def guess_separator(cells: Sequence[str]) -> str | None:
    """What separates the labels of a table's column: ``;``, ``|``, ``,`` or blanks between ids; None: nothing."""
    plain = [cell for cell in cells if cell.strip() and not cell.lstrip().startswith("[")]
    for separator in SEPARATORS:
        if any(separator in cell for cell in plain):
            return separator
    return " " if plain and all(cell.replace(" ", "").isdigit() for cell in plain) else None


def kind_of(value: Any) -> str:
    """How a sentence calls a value of JSON."""
    if value is None:
        return "null"
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}
    return names.get(type(value), f"a {type(value).__name__}")
