"""Corpora of Annif: TSV lines ``text <uri> <uri>`` without a header, or JSONL with a list of subjects.

A subject is known by its URI, or by its label where it has none.
"""

from collections.abc import Iterator
from typing import Any

from elmo_stream.data.readers.instance import Fields, Part, RawInstance, Source, make_instance
from elmo_stream.data.readers.jsonl import field, parse_object, string_field
from elmo_stream.data.readers.label_values import kind_of
from elmo_stream.data.readers.lines import decode, read_instances, split_lines
from elmo_stream.data.readers.sparse import first_line

_EXAMPLE = '{"text": "...", "subjects": [{"uri": "..."}]}'


def split(source: Source, fields: Fields, part_bytes: int) -> list[Part]:
    """See :class:`elmo_stream.data.readers.Format`."""
    return split_lines(source, part_bytes)


def read(part: Part, fields: Fields) -> Iterator[RawInstance]:
    """See :class:`elmo_stream.data.readers.Format`."""
    labeled = fields.label is not None
    json_lines = first_line(part.source.main)[0].lstrip().startswith(b"{")

    def parse_tsv(line: bytes) -> RawInstance:
        text, tab, uris = decode(line).partition("\t")
        if labeled and not tab:
            raise ValueError("no tab in the line; expected a text, a tab, and URIs of subjects between blanks.")
        return make_instance(text, [_uri(uri) for uri in uris.split()] if labeled else [])

    def parse_json(line: bytes) -> RawInstance:
        value = parse_object(line, _EXAMPLE)
        text = " ".join([string_field(value, name) for name in fields.text])
        return make_instance(text, _subjects(value, fields.label) if fields.label is not None else [])

    return read_instances(part, parse_json if json_lines else parse_tsv)


def _subjects(value: dict[str, Any], name: str) -> list[str]:
    subjects = field(value, name, "--label-field")
    if not isinstance(subjects, list):
        raise ValueError(f"field '{name}' is {kind_of(subjects)}; expected a list of subjects.")
    names = []
    for place, subject in enumerate(subjects, start=1):
        found = subject.get("uri", subject.get("label")) if isinstance(subject, dict) else None
        if not isinstance(found, str):
            raise ValueError(f"subject {place} in field '{name}' has no string 'uri' or 'label'.")
        names.append(_uri(found))
    return names


def _uri(text: str) -> str:
    return text[1:-1] if text.startswith("<") and text.endswith(">") else text
