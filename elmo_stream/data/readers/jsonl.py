"""JSONL: one object a line, with fields for the text and for the labels."""

import json
from collections.abc import Iterator
from typing import Any

from elmo_stream.data.readers.instance import Fields, Part, RawInstance, Source, make_instance
from elmo_stream.data.readers.label_values import LabelReader, kind_of
from elmo_stream.data.readers.lines import decode, read_instances, split_lines

_SEEN_CHARACTERS = 60


def split(source: Source, fields: Fields, part_bytes: int) -> list[Part]:
    """See :class:`elmo_stream.data.readers.Format`."""
    return split_lines(source, part_bytes)


def read(part: Part, fields: Fields) -> Iterator[RawInstance]:
    """See :class:`elmo_stream.data.readers.Format`."""
    labels_of, example, where = LabelReader(fields), _example(fields), f"field '{fields.label}'"

    def parse(line: bytes) -> RawInstance:
        value = parse_object(line, example)
        text = " ".join([string_field(value, name) for name in fields.text])
        if fields.label is None:
            return make_instance(text, ())
        return make_instance(text, labels_of.value(field(value, fields.label, "--label-field"), where))

    return read_instances(part, parse)


def parse_object(line: bytes, example: str) -> dict[str, Any]:
    """One line of JSONL as a flat object.

    Raises:
        ValueError: what is wrong and what was expected, in one sentence.
    """
    text = decode(line)
    try:
        if text.startswith("\ufeff"):
            raise json.JSONDecodeError("a byte order mark", text, 0)
        value = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"not valid JSON ({error.msg} at column {error.colno}); expected one object a line."
        ) from error
    except ValueError as error:
        if "digits" in str(error):
            raise ValueError("a number has more than 4,300 digits; expected texts and labels.") from error
        raise
    except RecursionError as error:
        raise ValueError("the JSON is nested too deeply; expected one flat object a line.") from error
    if not isinstance(value, dict):
        raise ValueError(f"the line holds {kind_of(value)}; expected an object such as {example}.")
    return value


def field(value: dict[str, Any], name: str, option: str) -> Any:
    """A field that must be there; ``option`` is what would choose another one."""
    if name not in value:
        present = ", ".join(f"'{key[:_SEEN_CHARACTERS]!s}'" for key in list(value)[:8]) or "none"
        raise ValueError(f"field '{name}' is missing (fields of the line: {present}); choose another with {option}.")
    return value[name]


def string_field(value: dict[str, Any], name: str) -> str:
    """A field that must be there and a string."""
    text = field(value, name, "--text-field")
    if not isinstance(text, str):
        raise ValueError(f"field '{name}' is {kind_of(text)}; expected a string.")
    return text


def _unique_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a field occurs twice in one object; expected each once.")
    return value


_DECODER = json.JSONDecoder(object_pairs_hook=_unique_object)


def _example(fields: Fields) -> str:
    example: dict[str, Any] = dict.fromkeys(fields.text, "...")
    return json.dumps(example if fields.label is None else example | {fields.label: ["..."]})
