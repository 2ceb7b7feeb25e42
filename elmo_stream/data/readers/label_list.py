"""The list of labels that ids count in: ``Y.txt`` (a name a line) or ``lbl.json`` (title and content a line).

A list becomes a folder of flat files once, so that every process maps it instead of reading it.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from elmo_stream.data.arrays import map_array, save_array
from elmo_stream.data.hashing import hash_names
from elmo_stream.data.readers.instance import MAX_LABEL_BYTES, InputFile, refusal, refuse_surrogates
from elmo_stream.data.readers.lines import READ_AS_LATIN_1, decode, encoding_of, read_lines, strip_end
from elmo_stream.errors import UserError

_NAMES, _TEXTS = "names", "texts"
_BLOCK = 1 << 16


class LabelList:
    """Names by the ids of the input, memory-mapped: ``labels[ids]``.

    Args:
        folder: what :func:`build_label_list` made.
    """

    def __init__(self, folder: Path | str) -> None:
        self._names, self._texts = (_Strings(Path(folder) / kind) for kind in (_NAMES, _TEXTS))

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, ids: Sequence[int]) -> list[str]:
        return [self._names[label].decode() for label in ids]

    def text(self, label: int) -> bytes:
        """The text of a label, UTF-8; the same as its name where the list has no more."""
        return self._texts[label]


class _Strings:
    def __init__(self, path: Path) -> None:
        self._offsets = map_array(path.with_suffix(".npy"))
        blob = path.with_suffix(".bin")
        self._blob = np.memmap(blob, np.uint8, "r") if blob.stat().st_size else np.empty(0, np.uint8)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, place: int) -> bytes:
        return self._blob[self._offsets[place] : self._offsets[place + 1]].tobytes()


def build_label_list(file: InputFile, folder: Path, report: Callable[[str], None]) -> None:
    """Read a list of labels into ``folder``; reports what had to be read or named otherwise.

    A name is the title, or the line; an empty one becomes ``#id``, and names that several labels share get
    `` #id`` behind them, since the labels of a store are known by their names.

    Raises:
        UserError: a line cannot be read, a name is too long, or names cannot be told apart.
    """
    names, texts = [], []
    hashes: list[NDArray[np.uint64]] = []
    with open(folder / f"{_TEXTS}.bin", "wb") as text_stream, open(folder / "plain.bin", "wb") as name_stream:
        block: list[bytes] = []
        for name, text in _entries(file, report):
            names.append(len(name))
            texts.append(len(text))
            name_stream.write(name)
            text_stream.write(text)
            block.append(name)
            if len(block) == _BLOCK:
                hashes.append(hash_names(block)[0])
                block.clear()
        hashes.append(hash_names(block)[0])
    if not names:
        raise UserError(f"{file.name}: holds no label; expected one a line.")
    _save_offsets(folder / f"{_TEXTS}.npy", texts)
    shared = _write_distinct(folder, names, np.concatenate(hashes))
    (folder / "plain.bin").unlink()
    if shared:
        report(f"{file.name}: {shared:,} labels have no name or share one; their ids were put behind it")


def _write_distinct(folder: Path, lengths: list[int], hashes: NDArray[np.uint64]) -> int:
    _, inverse, counts = np.unique(hashes, return_inverse=True, return_counts=True)
    shared = (counts[inverse] > 1) | (np.array(lengths) == 0)
    final: list[NDArray[np.uint64]] = []
    with open(folder / "plain.bin", "rb") as plain, open(folder / f"{_NAMES}.bin", "wb") as stream:
        for first in range(0, len(lengths), _BLOCK):
            block = []
            for label in range(first, min(first + _BLOCK, len(lengths))):
                name = plain.read(lengths[label])
                if shared[label]:
                    name = (name + b" #%d" % label).lstrip()
                lengths[label] = len(name)
                block.append(name)
            stream.writelines(block)
            final.append(hash_names(block)[0])
    if len(np.unique(np.concatenate(final))) != len(lengths):
        raise UserError("--labels: two labels have the same name, even with their ids behind it; rename one of them.")
    _save_offsets(folder / f"{_NAMES}.npy", lengths)
    return int(shared.sum())


def _save_offsets(path: Path, lengths: list[int]) -> None:
    save_array(path, np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]))


def _entries(file: InputFile, report: Callable[[str], None]) -> Iterator[tuple[bytes, bytes]]:
    """(name, text) of each line, UTF-8."""
    json_lines, encoding = None, encoding_of(file)
    for offset, line in read_lines(file, 0, file.path.stat().st_size):
        try:
            if json_lines is None:
                json_lines = line.lstrip().startswith(b"{")
                if encoding != "utf-8" and not json_lines:
                    report(f"{file.name}: {READ_AS_LATIN_1}")
            name, text = _json_entry(line) if json_lines else (strip_end(line).decode(encoding).strip(),) * 2
            if len(name.encode()) > MAX_LABEL_BYTES:
                raise ValueError(f"the name is longer than {MAX_LABEL_BYTES} bytes; expected a name a line.")
        except ValueError as error:
            raise refusal(file, offset, str(error)) from error
        yield name.encode(), text.encode()


def _json_entry(line: bytes) -> tuple[str, str]:
    try:
        value = json.loads(decode(line))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"not valid JSON ({error}); expected one object a line, as in the lines before.") from error
    if not isinstance(value, dict) or not isinstance(value.get("title"), str):
        raise ValueError('expected an object with a string \'title\', such as {"title": "...", "content": ""}.')
    content = value.get("content") or ""
    if not isinstance(content, str):
        raise ValueError("'content' is no string; expected a string or none.")
    title = value["title"].strip()
    text = f"{title} {content}".strip()
    refuse_surrogates(text, "the title or content")
    return title, text
