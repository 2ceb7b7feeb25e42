"""``trn.json`` of the Extreme Classification Repository: title, content and label ids, one object a line."""

import math
from collections.abc import Iterator
from typing import Any

from elmo_stream.data.readers.instance import Fields, Part, RawInstance, Source, make_instance
from elmo_stream.data.readers.jsonl import field, parse_object, string_field
from elmo_stream.data.readers.label_values import LabelReader, kind_of
from elmo_stream.data.readers.lines import read_instances, split_lines

_EXAMPLE = '{"title": "...", "content": "", "target_ind": [3, 17]}'
_MAY_LACK = "content"


def split(source: Source, fields: Fields, part_bytes: int) -> list[Part]:
    """See :class:`elmo_stream.data.readers.Format`."""
    return split_lines(source, part_bytes)


def read(part: Part, fields: Fields) -> Iterator[RawInstance]:
    """See :class:`elmo_stream.data.readers.Format`."""
    labels_of = LabelReader(fields)

    def parse(line: bytes) -> RawInstance:
        value = parse_object(line, _EXAMPLE)
        present = [name for name in fields.text if name != _MAY_LACK or name in value]
        text = " ".join([piece for name in present if (piece := string_field(value, name))])
        return make_instance(text, [] if fields.label is None else labels_of.ids(_ids(value, fields.label)))

    return read_instances(part, parse)


def _ids(value: dict[str, Any], name: str) -> list[int]:
    ids = field(value, name, "--label-field")
    odd = [kind_of(label) for label in ids if type(label) is not int] if isinstance(ids, list) else [kind_of(ids)]
    if odd:
        raise ValueError(f"field '{name}' holds {odd[0]}; expected a list of label ids such as [3, 17].")
    relevance = value.get("target_rel")
    if relevance is None:
        return ids
    numbers = isinstance(relevance, list) and all(
        type(number) in (int, float) and 0 <= number < math.inf for number in relevance
    )
    if not numbers or len(relevance) != len(ids):
        raise ValueError(f"field 'target_rel' is not a list of {len(ids)} numbers from 0, one for each label.")
    return [label for label, number in zip(ids, relevance, strict=True) if number]
