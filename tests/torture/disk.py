"""A model of a disk that loses power: what calls a program made, and what of it may be left.

Only what was flushed is sure to be there: the content of a file by fsync of the file, the names in a folder by fsync of
the folder. The rest may be there, or not, or in part. (Calls as strace prints them with ``-xx``.)
"""

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

CALLS = (
    "openat,close,dup,dup2,fcntl,lseek,write,pwrite64,writev,ftruncate,copy_file_range,sendfile,fallocate,"
    "mkdir,rename,renameat,renameat2,unlink,unlinkat,rmdir,fsync,fdatasync,newfstatat"
)
Left = Literal["kept", "dropped", "empty", "torn"]
LEFT: tuple[Left, ...] = ("kept", "dropped", "empty", "torn")
_LINE = re.compile(r"^(\d+) +(\w+)\((.*)\) += (-?\d+)")
_UNFINISHED = re.compile(r"^(\d+) +(\w+\(.*) <unfinished \.\.\.>$")
_RESUMED = re.compile(r"^(\d+) +<\.\.\. \w+ resumed>(.*)$")
_UNKNOWN = ("writev", "copy_file_range", "sendfile", "fallocate", "dup2")


@dataclass
class _File:
    data: bytes = b""
    flushed: bytes = b""
    pending: list[tuple[int, bytes]] = field(default_factory=list)


@dataclass
class _Folder:
    names: dict[str, "_Node"] = field(default_factory=dict)
    flushed: dict[str, "_Node"] = field(default_factory=dict)
    pending: list[dict[str, "_Node | None"]] = field(default_factory=list)

    def change(self, **names: "_Node | None") -> None:
        """Names that appear, and those that go (None), in one step."""
        _apply(self.names, names)
        self.pending.append(names)


_Node = _File | _Folder


@dataclass
class _Open:
    node: _Node
    path: str
    place: int
    append: bool


class Disk:
    """The files below ``root``, an existing folder that is flushed, as calls change them."""

    def __init__(self, root: Path) -> None:
        self._root, self._top = str(root), _Folder()
        self._open: dict[int, _Open] = {}

    def replay(self, lines: list[str]) -> Iterator[str]:
        """Apply the calls of a trace, one after the other; yields the name of each that may change what is left, and
        the path of each file that was looked for.
        """
        for name, text, result in _calls(lines):
            if result < 0 and name != "newfstatat":
                continue
            strings = [bytes.fromhex(found.replace("\\x", "")) for found in re.findall(r'"((?:\\x..)*)"', text)]
            rest = re.sub(r'"(?:\\x..)*"(\.\.\.)?', "", text)
            numbers = [
                int(number, 8 if number.startswith("0") else 10) for number in re.findall(r"(?<![\w-])\d+", rest)
            ]
            yield from self._apply(name, text, strings, numbers, result)

    def left(self, what: Left, rng: random.Random) -> dict[str, bytes | None]:
        """Content by path, None for folders, after a power cut at this moment: everything ``kept``, everything
        unflushed ``dropped``, all names but no unflushed content (``empty``), or of each file and folder a random first
        part of what was not flushed (``torn``).
        """
        found: dict[str, bytes | None] = {}
        self._collect(self._top, "", what, rng, found)
        return found

    def _collect(
        self, folder: _Folder, place: str, what: Left, rng: random.Random, found: dict[str, bytes | None]
    ) -> None:
        names = folder.names if what in ("kept", "empty") else dict(folder.flushed)
        if what == "torn":
            for change in folder.pending[: rng.randint(0, len(folder.pending))]:
                _apply(names, change)
        for name, node in names.items():
            path = f"{place}{name}"
            if isinstance(node, _Folder):
                found[path] = None
                self._collect(node, f"{path}/", what, rng, found)
            else:
                found[path] = node.data if what == "kept" else node.flushed
                if what == "torn":
                    found[path] = _torn(node, rng)

    def _apply(self, name: str, text: str, strings: list[bytes], numbers: list[int], result: int) -> Iterator[str]:
        paths = [self._resolve(text, string.decode(errors="replace")) for string in strings[:2]]
        if name == "openat":
            yield from self._opened(paths[0], text, result)
        elif name == "newfstatat":
            if paths and paths[0].startswith(self._root):
                yield paths[0]
        elif name == "close":
            self._open.pop(numbers[0], None)
        elif name in ("mkdir", "rmdir", "unlink", "unlinkat", "rename", "renameat", "renameat2"):
            yield from self._renamed(name, paths)
        elif numbers and (opened := self._open.get(numbers[0])) is not None:
            if name == "dup" or (name == "fcntl" and "F_DUPFD" in text):
                self._open[result] = opened
            elif name in _UNKNOWN:
                raise RuntimeError(f"the model of a disk does not know {name}: {text[:200]}")
            yield from self._written(opened, name, strings, numbers, result)

    def _opened(self, path: str, text: str, descriptor: int) -> Iterator[str]:
        self._open.pop(descriptor, None)
        if not path.startswith(f"{self._root}/") and path != self._root:
            return
        folder, name = self._parent(path)
        node = self._top if path == self._root else folder.names.get(name)
        if node is None:
            node = _File()
            folder.change(**{name: node})
            yield "create"
        elif "O_TRUNC" in text and isinstance(node, _File) and node.data:
            node.data = b""
            node.pending.append((-1, b""))
            yield "truncate"
        self._open[descriptor] = _Open(node, path, 0, "O_APPEND" in text)

    def _renamed(self, name: str, paths: list[str]) -> Iterator[str]:
        if not paths[0].startswith(f"{self._root}/"):
            return
        folder, last = self._parent(paths[0])
        if name == "mkdir":
            folder.change(**{last: _Folder()})
        elif name.startswith("rename"):
            target, new_last = self._parent(paths[1])
            if target is not folder:
                raise RuntimeError("the model of a disk does not know a rename into another folder")
            folder.change(**{last: None, new_last: folder.names[last]})
        else:
            folder.change(**{last: None})
        yield name

    def _written(
        self, opened: _Open, name: str, strings: list[bytes], numbers: list[int], result: int
    ) -> Iterator[str]:
        node = opened.node
        if name in ("fsync", "fdatasync"):
            if isinstance(node, _File):
                node.flushed, node.pending = node.data, []
            else:
                node.flushed, node.pending = dict(node.names), []
            yield name
        elif name == "lseek":
            opened.place = result
        elif name in ("write", "pwrite64", "ftruncate") and isinstance(node, _File):
            if name == "ftruncate":
                node.data = node.data[: numbers[1]].ljust(numbers[1], b"\0")
                node.pending.append((-1 - numbers[1], b""))
                yield name
                return
            place = numbers[-1] if name == "pwrite64" else len(node.data) if opened.append else opened.place
            node.data = _put(node.data, place, strings[0][:result])
            node.pending.append((place, strings[0][:result]))
            if name == "write":
                opened.place = place + result
            yield name

    def _resolve(self, text: str, path: str) -> str:
        """A path relative to an open folder, made absolute."""
        first = re.match(r"(\d+)", text)
        if path.startswith("/") or first is None or int(first[1]) not in self._open:
            return path
        return f"{self._open[int(first[1])].path}/{path}"

    def _parent(self, path: str) -> tuple[_Folder, str]:
        node = self._top
        *parts, last = path.removeprefix(self._root).strip("/").split("/")
        for part in parts:
            below = node.names[part]
            assert isinstance(below, _Folder)
            node = below
        return node, last


def _apply(names: dict[str, _Node], change: dict[str, "_Node | None"]) -> None:
    for name, node in change.items():
        if node is None:
            names.pop(name, None)
        else:
            names[name] = node


def _put(data: bytes, place: int, piece: bytes) -> bytes:
    """Content after a write; a negative place stands for a cut to ``-1 - place`` bytes."""
    if place < 0:
        return data[: -1 - place].ljust(-1 - place, b"\0")
    return data[:place].ljust(place, b"\0") + piece + data[place + len(piece) :]


def _torn(node: _File, rng: random.Random) -> bytes:
    data, count = node.flushed, rng.randint(0, len(node.pending))
    for number, (place, piece) in enumerate(node.pending[:count]):
        cut = rng.randint(0, len(piece)) if number == count - 1 else len(piece)
        data = _put(data, place, piece[:cut])
    return data


def _calls(lines: list[str]) -> Iterator[tuple[str, str, int]]:
    """(name, arguments, result) of each call, at the moment of its end."""
    begun: dict[str, str] = {}
    for line in lines:
        if unfinished := _UNFINISHED.match(line):
            begun[unfinished[1]] = unfinished[2]
            continue
        if (resumed := _RESUMED.match(line)) and resumed[1] in begun:
            line = f"{resumed[1]} {begun.pop(resumed[1])}{resumed[2]}"
        if call := _LINE.match(line):
            yield call[2], call[3], int(call[4])
