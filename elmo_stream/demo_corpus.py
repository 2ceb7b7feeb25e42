"""Real text that every machine has: the functions of the installed Python environment.

An instance is one function with a docstring. Its text is the function's name and docstring, its labels are
the names of the functions that it calls. Nothing is downloaded, and no path of the machine enters a text.
"""

import ast
import hashlib
import json
import multiprocessing
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

from elmo_stream.errors import UserError
from elmo_stream.files import write_bytes_durably

MAX_TEXT_CHARS = 2_000
MAX_FILE_BYTES = 4 << 20
MIN_LABEL_INSTANCES = 2
MAX_LABEL_SHARE = 0.02
TEST_PERCENT = 15
_FILES_PER_TASK = 64


class Function(NamedTuple):
    """A function's name and docstring, and the sorted names of the functions it calls."""

    text: str
    labels: tuple[str, ...]


def build_corpus(out: Path, roots: list[Path] | None = None) -> dict[str, int]:
    """Write ``out/train.jsonl`` and ``out/test.jsonl`` from the Python sources below ``roots``.

    Labels are kept that at least two instances and at most 2 % of them have; what then has no label is
    dropped, and so are repetitions of the same text with the same labels. An instance goes to a split by a
    hash of its text, so the same text never stands in both. The output depends only on the sources.

    Args:
        out: folder for the two files; made if missing.
        roots: source folders; by default the standard library and the installed packages of this interpreter.

    Returns:
        Counts: ``files``, ``unreadable_files`` (not parsed, skipped), ``functions`` (distinct, with
        docstring and calls), ``labels``, ``dropped`` (functions left without a label), ``train`` and
        ``test`` (instances).

    Raises:
        UserError: the sources leave no training or no test instance.
        OSError: ``out`` cannot be written.
    """
    paths = _source_files(environment_roots() if roots is None else roots)
    found: dict[Function, None] = {}
    unreadable = 0
    for functions, failed in _parse_in_processes(paths):
        found.update(dict.fromkeys(functions))
        unreadable += failed
    frequency = Counter(label for function in found for label in function.labels)
    most = MAX_LABEL_SHARE * len(found)
    kept = {label for label, count in frequency.items() if MIN_LABEL_INSTANCES <= count <= most}
    lines: dict[str, list[str]] = {"train": [], "test": []}
    for function in found:
        if labels := [label for label in function.labels if label in kept]:
            row = json.dumps({"text": function.text, "labels": labels}, ensure_ascii=False)
            lines[split_of(function.text)].append(row + "\n")
    counts = {split: len(rows) for split, rows in lines.items()}
    if not all(counts.values()):
        raise UserError(f"{len(paths)} Python files gave {counts} instances; both splits need some.")
    out.mkdir(parents=True, exist_ok=True)
    for split, rows in lines.items():
        write_bytes_durably(out / f"{split}.jsonl", "".join(rows).encode())
    return {
        "files": len(paths),
        "unreadable_files": unreadable,
        "functions": len(found),
        "labels": len(kept),
        "dropped": len(found) - sum(counts.values()),
        **counts,
    }


def environment_roots() -> list[Path]:
    """The standard library and the installed packages of the running interpreter, each folder once."""
    return list(dict.fromkeys(Path(sysconfig.get_path(kind)) for kind in ("stdlib", "purelib", "platlib")))


def split_of(text: str) -> str:
    """``"test"`` for 15 % of all texts and ``"train"`` for the others: a function of the text alone."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return "test" if int.from_bytes(digest, "little") % 100 < TEST_PERCENT else "train"


def functions_of(source: bytes) -> list[Function]:
    """Functions and methods of a source file that have a docstring and call something by name.

    Raises:
        SyntaxError, ValueError, RecursionError, MemoryError: Python cannot parse the source.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tree = ast.parse(source)
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (docstring := ast.get_docstring(node)):
            calls = (inner for inner in ast.walk(node) if isinstance(inner, ast.Call))
            if labels := {_called_name(call.func) for call in calls} - {""}:
                text = f"{node.name} {docstring}"[:MAX_TEXT_CHARS]
                found.append(Function(text.encode(errors="replace").decode(), tuple(sorted(labels))))
    return found


def _called_name(called: ast.expr) -> str:
    if isinstance(called, ast.Name):
        return called.id
    return called.attr if isinstance(called, ast.Attribute) else ""


def _source_files(roots: list[Path]) -> list[Path]:
    """Python files below each root, sorted by their path within it.

    The standard library's folder often holds a ``site-packages`` that may belong to another environment: only
    the roots themselves decide what is installed.
    """
    foreign = {"site-packages", "dist-packages"}
    found: dict[Path, None] = {}
    for root in roots:
        inside = sorted(path.relative_to(root) for path in root.rglob("*.py"))
        found.update((root / path, None) for path in inside if foreign.isdisjoint(path.parts))
    return list(found)


def _parse_in_processes(paths: list[Path]) -> Iterator[tuple[list[Function], int]]:
    """``_parse_files`` over groups of files, in order; small sources are not worth a process."""
    groups = [paths[start : start + _FILES_PER_TASK] for start in range(0, len(paths), _FILES_PER_TASK)]
    if len(groups) <= 1:
        yield from map(_parse_files, groups)
        return
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(_parse_files, groups)


def _parse_files(paths: list[Path]) -> tuple[list[Function], int]:
    """Functions of the files in order, and how many files could not be read or parsed."""
    found: list[Function] = []
    failed = 0
    for path in paths:
        try:
            if path.stat().st_size > MAX_FILE_BYTES:
                raise ValueError("too large")
            found += functions_of(path.read_bytes())
        except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
            failed += 1
    return found, failed
