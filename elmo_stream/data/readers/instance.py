"""What every reader takes and gives: input files, parts of them, and instances. Refusals name file and line."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from elmo_stream.errors import UserError
from elmo_stream.files import reading

MAX_LINE_BYTES = 64 << 20
MAX_LABEL_BYTES = 4096
SCAN_BYTES = 1 << 20


@dataclass(frozen=True)
class Features:
    """A sparse vector: ``id_N`` int64, ascending without repetition, and ``weight_N`` float32, none of them 0."""

    id_N: NDArray[np.int64]
    weight_N: NDArray[np.float32]


class RawInstance(NamedTuple):
    """One instance as its author wrote it.

    Attributes:
        text: the text fields, joined by a space; empty where there are features instead.
        labels: distinct labels in the order of their first occurrence.
        duplicates: how many repeated labels were merged.
        features: a sparse vector instead of a text.
    """

    text: str
    labels: tuple[str, ...]
    duplicates: int
    features: Features | None = None


@dataclass(frozen=True)
class InputFile:
    """An input file: its name for messages, where its bytes are, and how they are packed (see ``unpack``)."""

    name: Path
    path: Path
    packing: str = ""


@dataclass(frozen=True)
class Source:
    """A file of instances in a format of the registry, with the file of their labels where that is another one."""

    format: str
    main: InputFile
    labels: InputFile | None = None


@dataclass(frozen=True)
class Part:
    """Instances of a source from ``first_row`` on.

    ``start`` and ``end`` are bytes of the main file that hold whole lines, or rows where the file has no lines;
    ``label_start`` and ``label_end`` are the same for the file of the labels, whose ids are below ``label_columns``;
    0 means that it holds names.
    """

    source: Source
    start: int
    end: int
    first_row: int = 0
    label_start: int = 0
    label_end: int = 0
    label_columns: int = 0
    encoding: str = "utf-8"


@dataclass(frozen=True)
class Fields:
    """What makes an instance.

    Attributes:
        text: fields joined to the text.
        label: field with the labels; None reads texts alone, for prediction.
        separator: what stands between the labels in one string; None: a string is one label.
        names: folder with the names of labels that are given as ids (see ``label_list``); None: the ids are the names.
    """

    text: tuple[str, ...] = ("text",)
    label: str | None = "labels"
    separator: str | None = None
    names: str | None = None


def make_instance(text: str, labels: Sequence[str], features: Features | None = None) -> RawInstance:
    """An instance with its repeated labels merged.

    Raises:
        ValueError: text or a label is no valid Unicode, or a label is empty or too long.
    """
    names = "".join(labels)
    if not (text.isascii() and names.isascii() and all(labels) and len(names) <= MAX_LABEL_BYTES):
        _check(text, labels)
    distinct = tuple(dict.fromkeys(labels))
    return RawInstance(text, distinct, len(labels) - len(distinct), features)


def _check(text: str, labels: Sequence[str]) -> None:
    refuse_surrogates(text, "the text")
    for place, label in enumerate(labels, start=1):
        if not label:
            raise ValueError(f"label {place} is empty; expected at least one character.")
        refuse_surrogates(label, f"label {place}")
        if len(label) > MAX_LABEL_BYTES // 4 and len(label.encode()) > MAX_LABEL_BYTES:
            raise ValueError(f"label {place} is longer than {MAX_LABEL_BYTES} bytes; expected a name.")


def refuse_surrogates(text: str, where: str) -> None:
    """Raise ``ValueError`` when ``text`` cannot be written as UTF-8."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{where} holds half of a surrogate pair (\\u{ord(text[error.start]):04x})."
                " Write the character itself, or both halves."
            ) from error


def refusal(file: InputFile, offset: int, what: str) -> UserError:
    """The error for the line that holds byte ``offset``; lines are counted only now, when one is needed."""
    line, left = 1, offset
    with reading(file.path) as stream:
        while left > 0 and (piece := stream.read(min(left, SCAN_BYTES))):
            line += piece.count(b"\n")
            left -= len(piece)
    return UserError(f"{file.name}:{line}: {what}")


def file_identity(path: Path) -> list[int]:
    """Size and modification time (ns): what tells whether a file was changed between two looks."""
    status = os.stat(path)
    return [status.st_size, status.st_mtime_ns]
