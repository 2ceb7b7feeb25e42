"""The folder of a store while it is built: whose it is, what is built there, and how it is cleared away."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from elmo_stream.data.index import BUILD_NAME, FILTERS, INDEX_NAME, SPLITS, VERSION, Propensity
from elmo_stream.data.inputs import InputOptions, Inputs
from elmo_stream.data.readers.instance import file_identity
from elmo_stream.errors import UserError
from elmo_stream.files import locked, new_folder, read_json, remove, temporaries, write_json_durably

_PLAN_NAME = "plan.json"
_PARTS = (*SPLITS, "labels", "tokenizer", FILTERS)


@dataclass(frozen=True)
class Options:
    """The options of a conversion that decide the content of the store."""

    inputs: InputOptions
    tokenizer: str
    max_length: int
    backend: str
    rows_per_shard: int
    seed: int
    propensity: Propensity


def plan_of(inputs: Inputs, options: Options, part_bytes: int) -> dict[str, Any]:
    """What is to be built, as JSON: an interrupted conversion continues exactly when this is equal."""
    files = [[str(file.path.resolve()), *file_identity(file.path)] for file in inputs.files()]
    splits = {split: [each.source.format for each in files] for split, files in inputs.splits.items()}
    plan = {"splits": splits, "files": files, "options": asdict(options), "part_bytes": part_bytes}
    # As it will be read back. "parts": how files are cut, by whose numbers finished parts are found again.
    return json.loads(json.dumps({"version": VERSION, "parts": 2, **plan}, default=str))


def inputs_unchanged(plan: dict[str, Any]) -> bool:
    """Whether the inputs of a plan still have the size and time they had."""
    return all(file_identity(Path(path)) == identity for path, *identity in plan["files"])


@contextmanager
def claim(out: Path, plan: dict[str, Any], report: Callable[[str], None]) -> Iterator[bool]:
    """Take ``out`` for building ``plan``, continuing what an interrupted conversion left.

    Yields whether the conversion was finished already, but for its scratch.

    Raises:
        UserError: ``out`` holds a store already, or something that is not ours.
        LockedError: another process is converting into ``out``.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: exists already and is not a folder; choose another place with --out.")
    with locked(out):
        build = out / BUILD_NAME
        same_plan = (build / _PLAN_NAME).is_file() and read_json(build / _PLAN_NAME) == plan
        finished = (out / INDEX_NAME).exists()
        if finished and not same_plan:
            raise UserError(f"{out}: exists already; choose another place with --out, or remove it first.")
        for path in temporaries(out):
            if path.name.startswith(BUILD_NAME):  # unborn
                remove(path)
        if not build.is_dir() and any(out.iterdir()):
            raise UserError(f"{out}: holds files of no conversion; choose an empty or new folder with --out.")
        if same_plan:
            report("continuing an interrupted conversion")
            _remove_temporaries(out)
        else:
            if build.is_dir():
                report("the inputs or options changed since an interrupted conversion: starting afresh")
                _remove_ours(out)
            with new_folder(build) as temporary:
                write_json_durably(temporary / _PLAN_NAME, plan)
        yield finished


@contextmanager
def join(out: Path, plan: dict[str, Any]) -> Iterator[Path]:
    """Take part in building ``plan`` in ``out`` beside the other jobs of an array; yields the scratch folder.

    Raises:
        UserError: ``out`` holds a store already, another conversion, or something that is not ours.
        LockedError: a conversion that is no job of an array works there.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: exists already and is not a folder; choose another place with --out.")
    with locked(out, shared=True):
        build = out / BUILD_NAME
        if (out / INDEX_NAME).exists():
            raise UserError(f"{out}: exists already; choose another place with --out, or remove it first.")
        if not build.is_dir():
            if any(not path.name.startswith(BUILD_NAME) for path in out.iterdir()):
                raise UserError(f"{out}: holds files of no conversion; choose an empty or new folder with --out.")
            try:
                with new_folder(build) as temporary:
                    write_json_durably(temporary / _PLAN_NAME, plan)
            except (UserError, OSError):
                if not build.is_dir():  # no other job was faster
                    raise
        check_plan(out, plan)
        yield build


def check_plan(out: Path, plan: dict[str, Any]) -> None:
    """Refuse where jobs of an array work, or have worked, on something else."""
    path = out / BUILD_NAME / _PLAN_NAME
    if not path.is_file() or read_json(path) != plan:
        raise UserError(
            f"{out}: holds no conversion of these inputs with these options; all jobs and --finalize must be given the "
            "same. Remove it, or choose another folder with --out."
        )


def discard(out: Path) -> None:
    """Remove what a conversion made in ``out``, and ``out`` itself when nothing else is in it."""
    _remove_ours(out)
    if not any(out.iterdir()):
        with suppress(OSError):  # of a link, a mount point, or the current folder
            out.rmdir()


def remove_scratch(out: Path) -> None:
    """Remove the scratch of a finished conversion, its plan last, so that another try can go on from a kill."""
    for path in (out / BUILD_NAME).iterdir():
        if path.name != _PLAN_NAME:
            remove(path)
    remove(out / BUILD_NAME)


def _remove_ours(out: Path) -> None:
    # Without its plan nothing half removed can be taken for finished work; the scratch folder goes last,
    # since it marks the rest as ours.
    (out / BUILD_NAME / _PLAN_NAME).unlink(missing_ok=True)
    _remove_temporaries(out)
    for name in (*_PARTS, BUILD_NAME):
        if (out / name).is_dir():
            remove(out / name)


def _remove_temporaries(out: Path) -> None:
    """Remove what killed processes were writing."""
    for folder in (out, *(out / name for name in (*_PARTS, BUILD_NAME))):
        for path in temporaries(folder):
            remove(path)
