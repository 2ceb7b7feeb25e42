"""Reading instances from JSONL in parts, so that many processes can read one file.

A line is what ends in byte 0x0A and nothing else: the Unicode line breaks that may occur inside a title do
not shift the rows. Every refusal names the file and the line.
"""

import json
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from elmo_stream.errors import UserError

MAX_LINE_BYTES = 64 << 20
MAX_LABEL_BYTES = 4096
JSONL_ENDINGS = (".jsonl", ".ndjson", ".json")
_BOM = b"\xef\xbb\xbf"
_SCAN_BYTES = 1 << 20
_SEEN_CHARACTERS = 60


@dataclass(frozen=True)
class RawInstance:
    """One instance as its author wrote it.

    Attributes:
        text: the text fields, joined by a space.
        labels: distinct labels in the order of their first occurrence.
        duplicates: how many repeated labels were merged.
    """

    text: str
    labels: tuple[str, ...]
    duplicates: int


@dataclass(frozen=True)
class Part:
    """Bytes ``start`` to ``end`` of a file: whole lines."""

    path: Path
    start: int
    end: int


@dataclass(frozen=True)
class Fields:
    """Which fields of a JSON object make an instance; ``label=None`` reads texts alone, for prediction."""

    text: tuple[str, ...] = ("text",)
    label: str | None = "labels"


def check_format(path: Path, format: str) -> None:
    """Refuse a file that no reader understands: ``auto`` goes by the ending, ``jsonl`` takes any name.

    Raises:
        UserError: the file is missing or not a regular file, or its format is not known.
    """
    if format not in ("auto", "jsonl"):
        raise UserError(f"--format {format}: unknown; expected auto or jsonl.")
    if not path.exists():
        raise UserError(f"{path}: no such file.")
    if not stat.S_ISREG(path.stat().st_mode):
        raise UserError(f"{path}: not a regular file; the conversion reads its input twice, so give a file on disk.")
    if format == "auto" and path.suffix.lower() not in JSONL_ENDINGS:
        raise UserError(
            f"{path}: the ending '{path.suffix}' says no known format; supported is JSONL "
            f"({', '.join(JSONL_ENDINGS)}; uncompressed), or say --format jsonl."
        )


def split_parts(path: Path, part_bytes: int) -> list[Part]:
    """Cut a file at line ends into parts of about ``part_bytes`` bytes.

    Raises:
        UserError: a line is longer than 64 MiB.
    """
    size = path.stat().st_size
    starts = [0]
    with open(path, "rb") as stream:
        for target in range(part_bytes, size, part_bytes):
            if target > starts[-1]:
                starts.append(_line_end(stream, path, target - 1))
    ends = [*starts[1:], size]
    return [Part(path, start, end) for start, end in zip(starts, ends, strict=True) if start < end]


def read_part(part: Part, fields: Fields) -> Iterator[RawInstance]:
    """Read the instances of a part in order; blank lines are allowed at the end of the file only.

    Raises:
        UserError: ``file:line: what is wrong, what was expected``.
    """
    with open(part.path, "rb") as stream:
        offset = part.start
        stream.seek(offset)
        while offset < part.end:
            line = stream.readline(MAX_LINE_BYTES + 1)
            if len(line) > MAX_LINE_BYTES:
                raise _refusal(part.path, offset, _TOO_LONG)
            content = line.removeprefix(_BOM) if offset == 0 else line
            if not content.strip():
                _check_rest_blank(stream, part.path, offset)
                return
            try:
                yield parse_instance(content, fields)
            except ValueError as error:
                raise _refusal(part.path, offset, str(error)) from error
            offset += len(line)


def parse_instance(line: bytes, fields: Fields) -> RawInstance:
    """Parse and check one line of JSONL.

    Raises:
        ValueError: what is wrong and what was expected, in one sentence.
    """
    try:
        value = json.loads(line.decode("utf-8"), object_pairs_hook=_unique_object)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"not UTF-8 (byte 0x{line[error.start]:02x} at byte {error.start + 1} of the line)."
        ) from error
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
        raise ValueError(f"the line holds {_kind(value)}; expected an object such as {_example(fields)}.")
    text = " ".join([_text(value, name, fields) for name in fields.text])
    if fields.label is None:
        return RawInstance(text, (), 0)
    labels = _labels(value, fields.label, fields)
    distinct = tuple(dict.fromkeys(labels))
    return RawInstance(text, distinct, len(labels) - len(distinct))


def _text(value: dict[str, Any], name: str, fields: Fields) -> str:
    text = _field(value, name, "--text-field", fields)
    if not isinstance(text, str):
        raise ValueError(f"field '{name}' is {_kind(text)}; expected a string.")
    _refuse_surrogates(text, f"field '{name}'")
    return text


def _labels(value: dict[str, Any], name: str, fields: Fields) -> list[str]:
    labels = _field(value, name, "--label-field", fields)
    if isinstance(labels, str):
        raise ValueError(f"field '{name}' is a string; expected a list of strings: write [{json.dumps(labels)[:80]}].")
    if not isinstance(labels, list):
        raise ValueError(f"field '{name}' is {_kind(labels)}; expected a list of strings.")
    for place, label in enumerate(labels, start=1):
        if not isinstance(label, str):
            raise ValueError(f"label {place} in field '{name}' is {_kind(label)}; expected a string.")
        if not label:
            raise ValueError(f"label {place} in field '{name}' is empty; expected at least one character.")
        _refuse_surrogates(label, f"label {place} in field '{name}'")
        if len(label) > MAX_LABEL_BYTES // 4 and len(label.encode()) > MAX_LABEL_BYTES:
            raise ValueError(
                f"label {place} in field '{name}' is longer than {MAX_LABEL_BYTES} bytes; expected a name."
            )
    return labels


def _field(value: dict[str, Any], name: str, option: str, fields: Fields) -> Any:
    if name not in value:
        present = ", ".join(f"'{key[:_SEEN_CHARACTERS]!s}'" for key in list(value)[:8]) or "none"
        raise ValueError(f"field '{name}' is missing (fields of the line: {present}); choose another with {option}.")
    return value[name]


def _unique_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a field occurs twice in one object; expected each once.")
    return value


def _refuse_surrogates(text: str, where: str) -> None:
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{where} holds half of a surrogate pair (\\u{ord(text[error.start]):04x})."
                " Write the character itself, or both halves."
            ) from error


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    names = {
        bool: "a boolean",
        int: "a number",
        float: "a number",
        str: "a string",
        list: "a list",
        dict: "an object",
    }
    return names[type(value)]


def _example(fields: Fields) -> str:
    example: dict[str, Any] = dict.fromkeys(fields.text, "...")
    return json.dumps(example if fields.label is None else example | {fields.label: ["..."]})


_TOO_LONG = f"the line is longer than {MAX_LINE_BYTES >> 20} MiB; expected one instance a line."


def _line_end(stream: BinaryIO, path: Path, start: int) -> int:
    """Offset just behind the first line end at or behind ``start``."""
    stream.seek(start)
    offset = start
    while piece := stream.read(_SCAN_BYTES):
        if (found := piece.find(b"\n")) >= 0:
            return offset + found + 1
        offset += len(piece)
        if offset - start > MAX_LINE_BYTES:
            raise _refusal(path, start, _TOO_LONG)
    return offset


def _check_rest_blank(stream: BinaryIO, path: Path, blank_offset: int) -> None:
    while piece := stream.read(_SCAN_BYTES):
        if piece.strip():
            raise _refusal(
                path, blank_offset, "the line is blank; blank lines are allowed at the end of the file only."
            )


def _refusal(path: Path, offset: int, what: str) -> UserError:
    """The error for the line that holds byte ``offset``; lines are counted only now, when one is needed."""
    line, left = 1, offset
    with open(path, "rb") as stream:
        while left > 0 and (piece := stream.read(min(left, _SCAN_BYTES))):
            line += piece.count(b"\n")
            left -= len(piece)
    return UserError(f"{path}:{line}: {what}")


def file_identity(path: Path) -> list[int]:
    """Size and modification time (ns): what tells whether a file was changed between two looks."""
    status = os.stat(path)
    return [status.st_size, status.st_mtime_ns]
