"""Durable files: whatever is read back later is complete, or does not exist.

Everything durable is written under a temporary name, flushed to the disk, and renamed. A folder (shard, checkpoint)
is built beside its final place and appears with one rename.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from elmo_stream.errors import CorruptError, LockedError, UserError
from elmo_stream.system import drop_cached, folder_lock, fsync_path

_READ_BYTES = _COPY_BYTES = 1 << 20
_FLUSH_BYTES = 64 << 20
MAX_JSON_BYTES = 1 << 30


def sha256_file(path: Path) -> str:
    """Hexadecimal SHA-256 of a file, read in pieces of one MiB."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while piece := stream.read(_READ_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def file_entry(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file, as an index or manifest lists it."""
    return {"bytes": path.stat().st_size, "sha256": sha256_file(path)}


def flush_and_forget(path: Path) -> None:
    """Flush a file to the disk and give its page cache back: memory does not fill with what is not read soon."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        drop_cached(descriptor)
    finally:
        os.close(descriptor)


def copy_listed(source: Path, target: Path, listed: dict[str, dict[str, Any]]) -> None:
    """Copy listed files to a new folder and compare them on the way; no more than 64 MiB wait for the disk at a time.

    Raises:
        CorruptError: naming the first file of ``source`` that is missing, cut or altered.
    """
    for name, entry in listed.items():
        path, digest, size = target / name, hashlib.sha256(), 0
        if not (source / name).is_file():
            raise CorruptError(f"{source / name}: missing, though it is listed as part of {source.name}.")
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(source / name, "rb") as stream, open(path, "wb", buffering=0) as out:
            while piece := stream.read(_COPY_BYTES):
                digest.update(piece)
                size += out.write(piece)
                if size % _FLUSH_BYTES == 0:
                    drop_cached(out.fileno())
            drop_cached(out.fileno())
        if (size, digest.hexdigest()) != (entry["bytes"], entry["sha256"]):
            raise CorruptError(f"{source / name}: its size or checksum differs from the one written; it is damaged.")


def write_bytes_durably(path: Path, data: bytes) -> None:
    """Write a file so that after a crash it is absent, as before, or complete."""
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        with open(temporary, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_path(path.parent)


def rename_durably(temporary: Path, final: Path) -> None:
    """Let a file that was written under a temporary name appear, flushed."""
    fsync_path(temporary)
    os.replace(temporary, final)
    fsync_path(final.parent)


def write_json_durably(path: Path, value: Any) -> None:
    """Write readable, key-ordered JSON durably."""
    write_bytes_durably(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """Read a JSON file of ours; a damaged one is a ``CorruptError`` that names the file."""
    if path.stat().st_size > MAX_JSON_BYTES:
        raise CorruptError(f"{path}: larger than {MAX_JSON_BYTES} bytes, which no file of this kind can be.")
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CorruptError(f"{path}: not valid JSON ({error}); the file is damaged.") from error


def fsync_tree(root: Path) -> None:
    """Flush a folder with everything below it."""
    for folder, _, names in os.walk(root, topdown=False):
        for name in names:
            fsync_path(Path(folder, name))
        fsync_path(Path(folder))


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder, made if missing, against other processes; the lock ends with this process, however it ends.

    Raises:
        LockedError: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with folder_lock(folder) as free:
        if not free:
            raise LockedError(f"{folder}: another process is working in this folder; let it end first.")
        yield


@contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """Fill a temporary folder, then let it appear as ``final`` in one step; on an error nothing remains.

    A folder that already stands at ``final`` is refused, so nothing durable is overwritten.
    """
    if final.exists():
        raise UserError(f"{final}: exists already; choose another place or remove it first.")
    temporary = final.with_name(f"{final.name}.tmp-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        fsync_tree(temporary)
        os.rename(temporary, final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    fsync_path(final.parent)


def list_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file below ``folder``, keyed by its relative POSIX path, for an index or manifest."""
    return {
        path.relative_to(folder).as_posix(): file_entry(path) for path in sorted(folder.rglob("*")) if path.is_file()
    }


def check_files(folder: Path, listed: dict[str, dict[str, Any]]) -> None:
    """Compare files with their listed sizes and checksums.

    Raises:
        CorruptError: naming the first file that is missing, cut or altered.
    """
    for name, entry in listed.items():
        path = folder / name
        if not path.is_file():
            raise CorruptError(f"{path}: missing, though it is listed as part of {folder.name}.")
        size = path.stat().st_size
        if size != entry["bytes"]:
            raise CorruptError(
                f"{path}: has {size} bytes where {entry['bytes']} were written; the file was cut or altered."
            )
        if sha256_file(path) != entry["sha256"]:
            raise CorruptError(f"{path}: its checksum differs from the one written; the file is damaged.")
