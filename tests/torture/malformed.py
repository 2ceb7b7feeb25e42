"""Malformed input is refused with file and line, code 2, and no output; fuzzed input is read or refused."""

import random
import shutil
from collections.abc import Callable
from pathlib import Path

from elmo_stream.data.readers import FORMATS, read_part, split_source
from elmo_stream.data.readers.detect import open_source
from elmo_stream.data.readers.instance import MAX_LINE_BYTES, Fields
from elmo_stream.data.readers.unpack import unpack
from elmo_stream.errors import UserError
from elmo_stream.training.predict import predict
from tests.cli_helpers import run_cli
from tests.data.readers.bad_files import ALL
from tests.torture.materials import make_run, make_store, quiet
from tests.torture.memory import MOST_BYTES, grown_bytes
from tests.torture.tally import Tally
from tools.fuzz_readers import fuzz

_LONG = {"jsonl": b"", "csv": b"text,labels\n", "tsv": b"text\tlabels\n", "xc-bow": b"1 4 3\n", "annif": b"a\t<x>\n"}


def attack(tries: int, folder: Path, seed: int) -> Tally:
    """Every bad file through ``shard``, ``predict`` and the readers of all formats; a try is a file and a reader."""
    tally = Tally()
    run = make_run(make_store(folder), folder / "run")
    cases = sorted(ALL.items())
    for name, (files, line, says) in random.Random(seed).sample(cases, k=min(tries, len(cases))):
        place = folder / "case"
        place.mkdir()
        for file, content in files.items():
            (place / file).write_bytes(content)
        main = place / next(iter(files))
        _try(tally, f"{name}: shard", lambda: _shard(main, line, says))  # noqa: B023  (it is called at once)
        _try(tally, f"{name}: predict", lambda: _predict(run, main))  # noqa: B023
        for format in FORMATS:
            _try(tally, f"{name}: as {format}", lambda: _read(main, format))  # noqa: B023
        shutil.rmtree(place)
    for format, head in _LONG.items():
        _try(tally, f"{format}: a line of a GiB", lambda: _endless(folder, format, head))  # noqa: B023
    return tally


def fuzz_attack(tries: int, folder: Path, seed: int) -> Tally:
    """So many executions of the fuzzer."""
    found = fuzz(tries, folder, seed=seed)
    return Tally(tries=found.executions, tracebacks=len(found.failures), notes=found.failures)


def _try(tally: Tally, what: str, call: Callable[[], str]) -> None:
    """Count a call, which says what is wrong, if anything."""
    tally.tries += 1
    wrong = ""
    try:
        with grown_bytes() as grown:
            wrong = call()
    except Exception as error:
        tally.tracebacks += 1
        tally.notes.append(f"{what}: {type(error).__name__}: {error}")
        return
    if grown() > MOST_BYTES:
        wrong = f"{wrong} took {grown() >> 20} MiB"
    if wrong:
        tally.lost += 1
        tally.notes.append(f"{what}: {wrong}")


def _shard(main: Path, line: int, says: str) -> str:
    out = main.parent / "store"
    result = run_cli("shard", main, "--out", out, "--workers", 1)
    place = f"{line}: " if line else ""
    if result.exit_code != 2 or says not in result.stderr or place not in result.stderr:
        return f"code {result.exit_code}, {result.output}"
    if "Traceback" in result.output or out.exists():
        return "a traceback, or a store was left"
    return "" if str(main.parent) in result.stderr else f"does not name the file: {result.stderr}"


def _predict(run: Path, main: Path) -> str:
    out = main.parent / "out.jsonl"
    try:
        count = predict(run, main, out, report=quiet)
    except UserError as error:
        named = str(main.parent) in str(error) or "cannot tag" in str(error)
        return "an output was left" if out.exists() else "" if named else str(error)
    lines = out.read_bytes().count(b"\n")
    out.unlink()
    return "" if lines == count else f"{lines} lines for {count} instances"


def _read(main: Path, format: str) -> str:
    plain = main.parent / "plain"
    shutil.rmtree(plain, ignore_errors=True)
    plain.mkdir()
    try:
        source, _ = open_source(main, format)
        files = {
            key: unpack(file, plain)
            for key, file in (("main", source.main), ("labels", source.labels))
            if file is not None and file.packing
        }
        source = type(source)(**{**vars(source), **files})
        fields = Fields(FORMATS[format].text_fields, FORMATS[format].label_field)
        for part in split_source(source, fields, 64):
            for _ in read_part(part, fields):
                pass
    except UserError as error:
        return "" if str(main.parent) in str(error) else f"does not name the file: {error}"
    return ""


def _endless(folder: Path, format: str, head: bytes) -> str:
    path = folder / "input"
    with open(path, "wb") as stream:
        stream.write(head)
        stream.truncate(1 << 30)
    result = run_cli("shard", path, "--format", format, "--out", folder / "new", "--workers", 1)
    path.unlink()
    line = head.count(b"\n") + 1
    said = f"{path}:{line}: " in result.stderr and f"{MAX_LINE_BYTES >> 20} MiB" in result.stderr
    return "" if result.exit_code == 2 and said else result.output
