"""Readers: one module a format, behind one registry. Every reader gives the same raw instances."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from elmo_stream.data.readers import annif, csv, jsonl, npz, parquet, tsv, xc_bow, xc_json, xc_text
from elmo_stream.data.readers.instance import Fields, Part, RawInstance, Source


@dataclass(frozen=True)
class Format:
    """How files of one format are read.

    Attributes:
        split: cuts a source into parts of about so many bytes, in the order of its rows. Raises ``UserError`` where
            the file as a whole is wrong.
        read: the instances of a part in order. Raises ``UserError``: ``file:line: what is wrong, what was expected``.
        text_fields, label_field: the fields of the format, where a user names no others.
        has_ids: labels are ids, which a list of labels may name.
        beside: labels may be in another file than texts or features.
        feature_count: number of features of a source; None where instances are texts.
        head_rows: rows of a table out of the first bytes of a file; None where there are no columns of strings.
    """

    split: Callable[[Source, Fields, int], list[Part]]
    read: Callable[[Part, Fields], Iterator[RawInstance]]
    text_fields: tuple[str, ...] = ("text",)
    label_field: str = "labels"
    has_ids: bool = True
    beside: bool = False
    feature_count: Callable[[Source], int] | None = None
    head_rows: Callable[[bytes], list[list[str]]] | None = None


FORMATS: dict[str, Format] = {
    "jsonl": Format(jsonl.split, jsonl.read),
    "csv": Format(csv.split, csv.read, head_rows=csv.head_rows),
    "tsv": Format(tsv.split, tsv.read, head_rows=tsv.head_rows),
    "parquet": Format(parquet.split, parquet.read),
    "xc-json": Format(xc_json.split, xc_json.read, text_fields=("title", "content"), label_field="target_ind"),
    "xc-text": Format(xc_text.split, xc_text.read, beside=True),
    "xc-bow": Format(xc_bow.split, xc_bow.read, beside=True, feature_count=xc_bow.feature_count),
    "npz": Format(npz.split, npz.read, beside=True, feature_count=npz.feature_count),
    "annif": Format(annif.split, annif.read, label_field="subjects", has_ids=False),
}


def split_source(source: Source, fields: Fields, part_bytes: int) -> list[Part]:
    """Cut a source, unpacked, into parts; raises what :class:`Format` says."""
    return FORMATS[source.format].split(source, fields, part_bytes)


def read_part(part: Part, fields: Fields) -> Iterator[RawInstance]:
    """The instances of a part in order; raises what :class:`Format` says."""
    return FORMATS[part.source.format].read(part, fields)
