"""Checkpoints: ``checkpoints/step-NNNNNNNN`` appears with one rename, complete, or not at all. No pickle.

The manifest lists every file with its size and SHA-256; a checkpoint without a manifest that agrees is none. The
classifier is written and read chunk by chunk, and can be read in other chunks than it was written in.
"""

import errno
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, cat, from_numpy

from elmo_stream.errors import CorruptError, UserError
from elmo_stream.files import (
    check_files,
    file_entry,
    flush_and_forget,
    new_folder,
    read_json,
    read_sealed_json,
    reading,
    remove,
    temporaries,
    write_json_durably,
    write_sealed_json,
)

FORMAT, VERSION = "elmo-stream-checkpoint", 1
_NAME = re.compile(r"step-(\d{8,})")


def checkpoints_folder(run: Path) -> Path:
    return run / "checkpoints"


def checkpoint_folder(run: Path, step: int) -> Path:
    """Where the checkpoint of a step is, or would be."""
    return checkpoints_folder(run) / f"step-{step:08d}"


def checkpoint_steps(run: Path) -> list[int]:
    """Steps of the checkpoints of a run, oldest first; unfinished ones are not among them."""
    folder = checkpoints_folder(run)
    found = [_NAME.fullmatch(path.name) for path in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(match[1]) for match in found if match)


def save_checkpoint(
    run: Path,
    step: int,
    *,
    state: dict[str, Any],
    encoder: dict[str, Tensor],
    optimizer: dict[str, Tensor],
    classifier: Iterable[tuple[int, int, dict[str, Tensor]]],
) -> Path:
    """Write a checkpoint; ``state`` is plain JSON, ``classifier`` yields (first label, last label, tensors).

    A whole checkpoint of this step that is already there is left as it is; a damaged one is replaced.
    """
    final = checkpoint_folder(run, step)
    if final.exists():
        try:
            verify_checkpoint(final)
            return final
        except CorruptError:
            _remove(final)
    with new_folder(final) as folder:
        files = {
            "encoder.safetensors": _save(encoder, folder / "encoder.safetensors"),
            "optimizer.safetensors": _save(optimizer, folder / "optimizer.safetensors"),
        }
        (folder / "classifier").mkdir()
        chunks = []
        for number, (first, last, tensors) in enumerate(classifier):
            name = f"classifier/chunk-{number:05d}.safetensors"
            files[name] = _save(tensors, folder / name)
            chunks.append({"file": name, "first_label": first, "last_label": last})
        write_json_durably(folder / "state.json", {**state, "step": step, "chunks": chunks})
        files["state.json"] = file_entry(folder / "state.json")
        body = {"format": FORMAT, "version": VERSION, "step": step, "files": dict(sorted(files.items()))}
        write_sealed_json(folder / "manifest.json", body)
    return final


def _save(tensors: dict[str, Tensor], path: Path) -> dict[str, Any]:
    """Write a file, and flush it before the next one, so that no more than one waits in memory for the disk."""
    try:
        save_file(tensors, path)
    except SafetensorError as error:  # what the library makes of a full disk
        raise OSError(errno.EIO, str(error), str(path)) from error
    entry = file_entry(path)
    flush_and_forget(path)
    return entry


def _remove(checkpoint: Path) -> None:
    """Take the name away first, so that a kill leaves no half-removed checkpoint."""
    doomed = checkpoint.with_name(f"{checkpoint.name}.tmp-{os.getpid()}")
    os.rename(checkpoint, doomed)
    remove(doomed)


def prune_checkpoints(run: Path, keep: int) -> None:
    """Remove all but the newest ``keep`` checkpoints, and what killed writers left behind."""
    for step in checkpoint_steps(run)[:-keep]:
        _remove(checkpoint_folder(run, step))
    for leftover in temporaries(checkpoints_folder(run)):
        remove(leftover)


def verify_checkpoint(folder: Path) -> dict[str, dict[str, Any]]:
    """Compare every file with the manifest, and return the files that it lists.

    Raises:
        CorruptError: naming the file that is missing, cut or altered.
    """
    manifest_path = folder / "manifest.json"
    if not manifest_path.is_file():
        raise CorruptError(f"{manifest_path}: missing; this checkpoint is incomplete.")
    manifest = read_sealed_json(manifest_path)
    try:
        if (manifest["format"], manifest["version"]) != (FORMAT, VERSION):
            raise CorruptError(
                f"{manifest_path}: version {manifest['version']} of {manifest['format']!r} is unknown "
                f"to this release, which reads version {VERSION}."
            )
        files = {
            str(name): {"bytes": int(entry["bytes"]), "sha256": str(entry["sha256"])}
            for name, entry in manifest["files"].items()
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CorruptError(f"{manifest_path}: damaged ({error!r}).") from error
    if any(Path(name).is_absolute() or ".." in Path(name).parts for name in files):
        raise CorruptError(f"{manifest_path}: names a file outside the checkpoint.")
    for needed in ("state.json", "encoder.safetensors", "optimizer.safetensors"):
        if needed not in files:
            raise CorruptError(f"{manifest_path}: does not list {needed}.")
    check_files(folder, files)
    return files


class Checkpoint:
    """A verified checkpoint, read lazily."""

    def __init__(self, folder: Path) -> None:
        files = verify_checkpoint(folder)
        self.folder = folder
        self.state: dict[str, Any] = read_json(folder / "state.json")
        try:
            self.step, self.total_steps = int(self.state["step"]), int(self.state["total_steps"])
            self._chunks = [
                (str(chunk["file"]), int(chunk["first_label"]), int(chunk["last_label"]))
                for chunk in self.state["chunks"]
            ]
        except (KeyError, TypeError, ValueError) as error:
            raise CorruptError(f"{folder / 'state.json'}: damaged ({error!r}).") from error
        if unlisted := [name for name, *_ in self._chunks if name not in files]:
            raise CorruptError(f"{folder / 'manifest.json'}: does not list {unlisted[0]}.")

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of ``encoder`` or ``optimizer``; raises ``CorruptError`` where the file holds none."""
        with _opened(self.folder / f"{name}.safetensors") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (it is no dictionary)

    def rows(self, name: str, first: int, last: int) -> Tensor:
        """Rows of the classifier's tensor ``name`` for labels ``first`` to ``last``."""
        pieces = []
        for file_name, begin, end in self._chunks:
            start, stop = max(first, begin), min(last, end)
            if start >= stop:
                continue
            with _opened(self.folder / file_name) as file:
                pieces.append(file.get_slice(name)[start - begin : stop - begin])
        rows = pieces[0] if len(pieces) == 1 else cat(pieces) if pieces else None
        if rows is None or len(rows) != last - first:
            raise CorruptError(
                f"{self.folder}: has no {name!r} for labels {first} to {last}; it belongs to another classifier."
            )
        return rows

    def copy_rows(self, name: str, label_L: NDArray[np.integer], into: Tensor) -> None:
        """Overwrite row i of the classifier's tensor ``into`` by that of label ``label_L[i]``, where there is one.

        The files are mapped, so memory is taken for the rows copied only.
        """
        for file_name, begin, end in self._chunks:
            place = np.flatnonzero((label_L >= begin) & (label_L < end))
            if not len(place):
                continue
            row = label_L[place].astype(np.int64) - begin
            with _opened(self.folder / file_name) as file:
                if name not in file.keys():  # noqa: SIM118  (it is no dictionary)
                    continue
                stored = file.get_tensor(name)
                here = row < len(stored)
                rows = stored[from_numpy(row[here])]
            if rows.dtype != into.dtype or rows.shape[1:] != into.shape[1:]:
                raise UserError(
                    f"{self.folder / file_name}: {name!r} is {rows.dtype} {tuple(rows.shape[1:])} a label, not "
                    f"{into.dtype} {tuple(into.shape[1:])}; its classifier has another format or size."
                )
            into[from_numpy(place[here])] = rows


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A file of tensors; raises ``CorruptError`` where it holds none, ``OSError`` where it cannot be opened."""
    with reading(path):  # for the library says of whatever happens that there is no such file
        pass
    try:
        try:
            opened = safe_open(path, framework="pt")
        except (OSError, RuntimeError) as error:  # the library's, and torch's, which opens the file again
            raise OSError(errno.EIO, f"could not be opened ({error})", str(path)) from error
        with opened as file:
            yield file
    except SafetensorError as error:
        raise CorruptError(f"{path}: {error}.") from error


def load_checkpoint(
    run: Path, step: int | None = None, *, strict: bool = False, report: Any = print
) -> Checkpoint | None:
    """The checkpoint of a step, or the newest one that is whole; None when there is none yet.

    A damaged newer checkpoint is reported and passed over, or where ``strict`` refused.

    Raises:
        UserError: the step asked for is not there.
        CorruptError: the step asked for is damaged, or all are, or where ``strict`` the newest.
    """
    steps = checkpoint_steps(run)
    if step is not None:
        if step not in steps:
            raise UserError(f"{run}: has no checkpoint of step {step}; it has {', '.join(map(str, steps)) or 'none'}.")
        return Checkpoint(checkpoint_folder(run, step))
    damage = None
    for candidate in reversed(steps):
        try:
            return Checkpoint(checkpoint_folder(run, candidate))
        except CorruptError as error:
            if strict:
                raise
            report(f"warning: {error} Going back to the checkpoint before it.")
            damage = error
    if damage is not None:
        raise CorruptError(f"{run}: no checkpoint is whole; the newest: {damage}") from damage
    return None
