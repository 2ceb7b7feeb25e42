"""Feeds broken files to the readers: each is read, or refused in a sentence that names the file; in bounded time.

    python -m tools.fuzz_readers [--executions 200000] [--format jsonl] [--crashes FOLDER]

Every execution changes a file that was kept before, and what reaches new lines of the readers is kept as well. Inputs
under which a reader raised anything but ``UserError``, or took longer than two seconds, are saved.
"""

import argparse
import gzip
import io
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import zstandard

from elmo_stream.data.filters import build_filter
from elmo_stream.data.readers import FORMATS, read_part, split_source
from elmo_stream.data.readers.detect import open_source
from elmo_stream.data.readers.instance import Fields
from elmo_stream.data.readers.unpack import unpack
from elmo_stream.errors import UserError

MOST_SECONDS = 2.0
_MOST_BYTES = 1 << 14
_TRACED_EACH = 4  # tracing costs more than reading
_READERS = str(Path(build_filter.__code__.co_filename).parent)
_TOKENS = [
    b"\n", b"\r\n", b"\0", b"\xef\xbb\xbf", b"\xff", b"\xe2\x80\xa8", b'"', b'\\"', b"\\ud800", b",", b";", b"\t",
    b" ", b":", b"[", b"]", b"{", b"}", b"[]", b"null", b"true", b"NaN", b"Infinity", b"-1", b"0", b"1e999", b"1e-400",
    b"999999999999",
    b"9" * 30, b"0x10", b"1_0", b"\xd9\xa1", b"#", b"qid:1", b"text", b"labels", b"<http://a>", b"target_ind",
]  # fmt: skip
_LABELS = b"2 5\n0:1 3:1\n4:1\n"


def _npz(**arrays: Any) -> bytes:
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    return stream.getvalue()


_MATRIX = _npz(
    data=np.array([0.5, 2.0, -1.0]), indices=np.array([1, 0, 2]), indptr=np.array([0, 1, 3]), shape=np.array([2, 5]),
    format=np.array(b"csr"),
)  # fmt: skip
_JSONL = b'{"text": "a caf\xc3\xa9", "labels": ["x", "y z"]}\n{"text": "b", "labels": [3, 14]}\n'
SEEDS: dict[str, tuple[str, bytes, bytes]] = {
    "jsonl": ("t.jsonl", _JSONL, b""),
    "jsonl.gz": ("t.jsonl.gz", gzip.compress(_JSONL), b""),
    "jsonl.zst": ("t.jsonl.zst", zstandard.ZstdCompressor().compress(_JSONL), b""),
    "csv": ("t.csv", b'text,labels\n"a ""b"", c","x|y"\nd,"[1, 2]"\n"e\nf",z\n', b""),
    "tsv": ("t.tsv", b"text\tlabels\na b\tx;y\nc\t[1, 2]\n", b""),
    "xc-json": ("t.json", b'{"title": "a", "content": "b", "target_ind": [0, 3], "target_rel": [1.0, 0]}\n' * 2, b""),
    "xc-text": ("t_X.txt", b"a first text\na second\n", _LABELS),
    "xc-bow": ("t.txt", b"3 6 5\n0,3 0:0.5 4:1e-3\n 1:1 2\n4 5:-2 # x\n", b""),
    "npz": ("X.t.npz", _MATRIX, _LABELS),
    "annif": ("t.tsv", b"a text\t<http://a> <http://b>\nb\t<http://a>\n", b""),
    "annif.jsonl": ("t.jsonl", b'{"text": "a", "subjects": [{"uri": "x"}, {"label": "y"}]}\n' * 2, b""),
}


@dataclass
class Found:
    """What a fuzzing saw: executions, those refused, inputs kept for the lines they reached, and failures."""

    executions: int = 0
    refused: int = 0
    kept: int = 0
    failures: list[str] = field(default_factory=list)


def fuzz(executions: int, folder: Path, *, seed: int = 0, only: str = "", crashes: Path | None = None) -> Found:
    """Run so many executions over all formats in turn; ``folder`` takes the files."""
    found, chance = Found(), random.Random(seed)
    corpus = {name: [parts[1:]] for name, parts in SEEDS.items() if not only or name.startswith(only)}
    reached: set[tuple[str, int]] = set()
    for number in range(executions):
        name = sorted(corpus)[number % len(corpus)]
        kept = corpus[name]
        main, labels = chance.choice(kept)
        if labels and chance.random() < 0.5:
            labels = mutate(labels, chance)
        else:
            main = mutate(main, chance)
        before = len(reached)
        traced = number // len(corpus) % _TRACED_EACH == 0
        failure = _execute(name, main, labels, folder, reached if traced else None, found)
        if len(reached) > before:
            kept.append((main, labels))
            found.kept += 1
        if failure:
            found.failures.append(f"{name}, execution {number} of seed {seed}: {failure}")
            if crashes is not None:
                (crashes / f"{name}-{seed}-{number}").write_bytes(main + b"\n--- labels\n" + labels)
    return found


def mutate(content: bytes, chance: random.Random) -> bytes:
    """One to four changes: bits, bytes, tokens, pieces moved, doubled, or cut."""
    changed = bytearray(content)
    for _ in range(chance.choice((1, 1, 2, 4))):
        at, length = chance.randrange(len(changed) + 1), chance.choice((1, 2, 8, 64))
        what = chance.randrange(6)
        if what == 0 and changed:
            changed[at - 1] ^= 1 << chance.randrange(8)
        elif what == 1:
            changed[at:at] = chance.choice(_TOKENS)
        elif what == 2:
            changed[at : at + length] = chance.choice(_TOKENS)
        elif what == 3:
            del changed[at : at + length]
        elif what == 4:
            changed[at:at] = changed[at : at + length] * chance.choice((1, 2, 50))
        else:
            changed[at : at + length] = chance.randbytes(length)
    return bytes(changed[:_MOST_BYTES])


def _execute(
    name: str, main: bytes, labels: bytes, folder: Path, reached: set[tuple[str, int]] | None, found: Found
) -> str:
    """One file through a reader; returns what went wrong, empty where nothing did."""
    path, label_file = folder / SEEDS[name][0], folder / "labels.txt"
    path.write_bytes(main)
    if labels:
        label_file.write_bytes(labels)
    start = time.perf_counter()
    found.executions += 1
    try:
        with nullcontext() if reached is None else _lines_into(reached):
            _read(path, name.partition(".")[0], label_file if labels else None, folder)
    except UserError as error:
        found.refused += 1
        if not str(error).startswith((str(path), str(label_file), "--label-file")):
            return f"does not name the file: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return f"took {seconds:.1f} s" if (seconds := time.perf_counter() - start) > MOST_SECONDS else ""


def _read(path: Path, format: str, label_file: Path | None, folder: Path) -> None:
    source, _ = open_source(path, format, label_file)
    if source.main.packing:
        source = replace(source, main=unpack(source.main, folder))
    fields = Fields(FORMATS[format].text_fields, FORMATS[format].label_field, separator="|")
    for part in split_source(source, fields, 40):
        for _ in read_part(part, fields):
            pass


@contextmanager
def _lines_into(reached: set[tuple[str, int]]) -> Iterator[None]:
    """Collect the lines of the readers that run meanwhile."""

    def line(frame: FrameType, event: str, _: Any) -> Callable[..., Any]:
        reached.add((frame.f_code.co_filename, frame.f_lineno))
        return line

    def call(frame: FrameType, event: str, _: Any) -> Callable[..., Any] | None:
        return line if frame.f_code.co_filename.startswith(_READERS) else None

    before = sys.gettrace()
    sys.settrace(call)
    try:
        yield
    finally:
        sys.settrace(before)


def main() -> int:
    """Fuzz, print what was found; 1 where something failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--executions", type=int, default=200_000)
    parser.add_argument("--format", default="", help="only seeds whose name starts so")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--crashes", type=Path, help="folder for the inputs that failed")
    options = parser.parse_args()
    start = time.perf_counter()
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=memory) as folder:
        found = fuzz(options.executions, Path(folder), seed=options.seed, only=options.format, crashes=options.crashes)
    print(*found.failures, sep="\n")
    print(
        f"{found.executions:,} executions in {time.perf_counter() - start:.0f} s: {found.refused:,} refused, "
        f"{found.kept:,} kept, {len(found.failures)} failed"
    )
    return int(bool(found.failures))


if __name__ == "__main__":
    sys.exit(main())
