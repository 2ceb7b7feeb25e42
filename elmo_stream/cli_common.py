"""What all verbs share: errors as one sentence with an exit code, common options, and how results are shown."""

import json
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import click

from elmo_stream.errors import ElmoStreamError, UserError, out_of_memory

EXIT_IO = 74
PROGRESS_SECONDS = 2.0
MAX_K = 4096  # any GPU's shared memory sorts twice as many candidates, which leaves room for the pairs of a filter


class _Folder(click.Path):
    """A folder on a disk; a URL is refused, since nothing there can appear with one rename, its index last."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if "://" in str(value):
            raise UserError(
                f"{value}: a URL, where a folder of a disk or a shared file system is needed; write there, "
                "then copy it, a store's index.json last."
            )
        return super().convert(value, param, ctx)


class _Store(click.Path):
    """The folder of a store, or the URL of one that is read where it is."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if "://" in str(value):
            from elmo_stream.data.remote import local_store

            return local_store(value)
        return super().convert(value, param, ctx)


FOLDER = _Folder(path_type=Path, file_okay=False)
STORE = _Store(path_type=Path, file_okay=False)
FILE = click.Path(path_type=Path, dir_okay=False)
INPUT_FILE = click.Path(path_type=Path, exists=True, dir_okay=False)


class Verbs(click.Group):
    """Turns every error into one sentence on stderr and the contract's exit code; ``--debug`` shows the traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        with _ending_signals() as caught:
            try:
                _require_working_folder()
                return super().invoke(ctx)
            except (click.ClickException, click.exceptions.Exit):
                raise
            except BaseException as error:
                if ctx.find_root().meta.get("debug"):
                    traceback.print_exception(error)
                # A signal in the middle of an import can come out of the library as any error.
                if caught:
                    message, code = f"ended by {signal.Signals(caught[0]).name}.", 128 + caught[0]
                else:
                    message, code = _explain(error)
        say(f"error: {message}")
        ctx.exit(code)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


def _require_working_folder() -> None:
    try:
        os.getcwd()
    except FileNotFoundError as error:
        raise UserError("the folder that this was called in is not there any more; go to another one.") from error


@contextmanager
def _ending_signals() -> Iterator[list[int]]:
    """SIGINT and SIGTERM raise ``KeyboardInterrupt``, so that half-written files are removed; yields those caught."""
    caught: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        caught.append(number)
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _explain(error: BaseException) -> tuple[str, int]:
    if isinstance(error, ElmoStreamError):
        return str(error), error.exit_code
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        reason = error.strerror or f"could not write all data ({error}); is the disk full?"
        return f"{where}{reason.rstrip('.')}.", EXIT_IO
    if out_of_memory(error):
        return "out of memory; lower train.batch or classifier.chunk_labels, or see `elmo-stream plan STORE`.", 1
    return f"{type(error).__name__}: {error} (this is a defect of ours; --debug shows where).", 1


def _set_debug(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        ctx.find_root().meta["debug"] = True


def debug_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """``--debug``."""
    return click.option(
        "--debug", is_flag=True, expose_value=False, callback=_set_debug, help="Show the traceback of an error."
    )(command)


def common_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """``--json`` and ``--debug``."""
    return click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")(debug_option(command))


def config_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """``--config`` and ``--set``."""
    command = click.option(
        "--set",
        "overrides",
        multiple=True,
        metavar="KEY=VALUE",
        help="Override a key, for example train.batch=256; train --dry-run lists all.",
    )(command)
    return click.option("--config", "config_file", type=INPUT_FILE, help="TOML file with configuration keys.")(command)


def memory_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """``--set`` of a verb that goes on with a run."""
    return click.option(
        "--set",
        "memory",
        multiple=True,
        metavar="memory.KEY=VALUE",
        help="Another budget than the run began with, for example memory.device=8GiB; changes no result.",
    )(command)


def on_oom_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """``--on-oom``."""
    return click.option(
        "--on-oom",
        type=click.Choice(["shrink"]),
        help="When memory runs out: go on from the last checkpoint with smaller chunks.  [default: end]",
    )(command)


def say(line: str) -> None:
    """A line for the person who watches, who may have gone; results alone go to stdout."""
    with suppress(OSError):
        click.echo(line, err=True)


class ProgressLines:
    """Says how far each stage is, at most every few seconds."""

    def __init__(self) -> None:
        self._said = time.monotonic()

    def __call__(self, stage: str, done: int, total: int) -> None:
        if time.monotonic() - self._said >= PROGRESS_SECONDS:
            self._said = time.monotonic()
            say(f"{stage}: {done:,} of {total:,}")


def show(value: Any, text: str, as_json: bool) -> None:
    """Print a result, for a program or for a person."""
    click.echo(json.dumps(value, indent=1, ensure_ascii=False) if as_json else text)


def as_lines(value: dict[str, Any], indent: str = "") -> str:
    """Nested values as indented lines; empty tables are left out."""
    rows = []
    for key, item in value.items():
        if isinstance(item, dict):
            rows += [f"{indent}{key}", as_lines(item, indent + "  ")] if item else []
        else:
            rows.append(f"{indent}{key:<24} {f'{item:,}' if type(item) is int else item}")
    return "\n".join(rows)


def parse_names(_: click.Context, __: click.Parameter, value: str | None) -> tuple[str, ...] | None:
    """``a,b`` as names."""
    if value is None:
        return None
    names = tuple(part.strip() for part in value.split(","))
    if not all(names):
        raise click.BadParameter("expected names separated by commas.")
    return names


def parse_ks(_: click.Context, __: click.Parameter, value: str) -> tuple[int, ...]:
    """``1,3,5`` as ascending lengths of a ranking."""
    try:
        ks = tuple(sorted({int(part) for part in value.split(",")}))
    except ValueError:
        ks = ()
    if not ks or ks[0] < 1 or ks[-1] > MAX_K:
        raise click.BadParameter(f"expected numbers from 1 to {MAX_K} separated by commas, for example 1,3,5.")
    return ks


def parse_propensity(_: click.Context, __: click.Parameter, value: str) -> tuple[float, float]:
    """``A,B`` of the propensity model."""
    try:
        a, b = (float(part) for part in value.split(","))
    except ValueError:
        a = b = float("nan")
    if not (0 <= a <= 10 and 0 < b <= 1000):
        raise click.BadParameter("expected A,B, for example 0.55,1.5.")
    return a, b
