"""Durable files: whatever is read back later is complete, or does not exist.

Everything durable is written under a temporary name, flushed to the disk, and renamed. A folder (shard, checkpoint)
is built beside its final place and appears with one rename.
"""

import errno
import hashlib
import json
import os
import platform
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol

from elmo_stream.errors import CorruptError, LockedError, UserError
from elmo_stream.system import available_cpus, drop_cached, folder_lock, fsync_path, process_lives
from elmo_stream.threads import DaemonThreads

_READ_BYTES = 1 << 20
_FLUSH_BYTES = 64 << 20
_TEMPORARY = ".tmp-"
MAX_JSON_BYTES = 1 << 30


@contextmanager
def naming(path: "Readable") -> Iterator[None]:
    """Let an ``OSError`` that names no file, as those of reading, writing and flushing do, name ``path``."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        reason = error.strerror or f"could not write all data ({error}); is the disk full?"
        raise OSError(error.errno or errno.EIO, reason, str(path)) from error


@contextmanager
def reading(path: Path) -> Iterator[BinaryIO]:
    """Open a file for reading; an ``OSError`` names it, also where it is read to write another."""
    with naming(path), open(path, "rb") as stream:
        yield stream


def sha256_file(path: Path) -> str:
    """Hexadecimal SHA-256 of a file, read in pieces of one MiB."""
    digest = hashlib.sha256()
    with reading(path) as stream:
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
        with naming(path):
            drop_cached(descriptor)
    finally:
        os.close(descriptor)


def write_bytes_durably(path: Path, data: bytes) -> None:
    """Write a file so that after a crash it is absent, as before, or complete."""
    with new_file(path) as stream:
        stream.write(data)


@contextmanager
def new_file(final: Path) -> Iterator[BinaryIO]:
    """Write a temporary file, then let it appear as ``final``, flushed, in one step; on an error nothing remains.

    Raises:
        OSError: it cannot be written; names it.
    """
    temporary = _temporary(final)
    with naming(final):
        try:
            with open(temporary, "wb") as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, final)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        fsync_path(final.parent)


def write_json_durably(path: Path, value: Any) -> None:
    """Write readable JSON durably."""
    write_bytes_durably(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode(errors="surrogatepass"))


def read_json(path: Path) -> Any:
    """Read a JSON file of ours; a damaged one is a ``CorruptError`` that names the file."""
    if path.stat().st_size > MAX_JSON_BYTES:
        raise CorruptError(f"{path}: larger than {MAX_JSON_BYTES} bytes, which no file of this kind can be.")
    try:
        with reading(path) as stream:
            return json.loads(stream.read())
    except (ValueError, RecursionError) as error:
        raise CorruptError(f"{path}: not valid JSON ({error}); the file is damaged.") from error


def write_sealed_json(path: Path, body: dict[str, Any]) -> None:
    """``write_json_durably`` with a checksum of the body in the file."""
    write_json_durably(path, {**body, "sha256": _json_digest(body)})


def read_sealed_json(path: Path, *, first_had_none: bool = False) -> dict[str, Any]:
    """The body that ``write_sealed_json`` wrote; ``first_had_none``: one without a checksum passes too.

    Raises:
        CorruptError: the file is damaged.
    """
    body = read_json(path)
    seal = body.pop("sha256", None) if isinstance(body, dict) else ""
    if seal != _json_digest(body) and not (seal is None and first_had_none):
        raise CorruptError(f"{path}: its checksum differs from the one written; the file is damaged.")
    return dict(body)


def _json_digest(value: Any) -> str:
    """However its text is laid out."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _temporary(final: Path) -> Path:
    """Where this process writes ``final``; what processes of this machine left there that were killed goes now.

    Processes of several machines may write into one shared folder.
    """
    mine = f"{final.name}{_TEMPORARY}{platform.node()}-"
    with suppress(OSError):  # of others, or removed by another process meanwhile
        for path in final.parent.iterdir():
            number = path.name.removeprefix(mine)
            if path.name != number and number.isdecimal() and not process_lives(int(number)):
                remove(path)
    return final.with_name(f"{mine}{os.getpid()}")


def remove(path: Path) -> None:
    """Remove a file, or a folder with all that is in it; nothing there is fine. An ``OSError`` names ``path``."""
    try:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
    except OSError as error:  # shutil names a file without its folder
        raise OSError(error.errno, error.strerror, str(path)) from error


def temporaries(folder: Path) -> list[Path]:
    """What stands in a folder, if it is there, under the temporary names that everything durable has at first."""
    return [path for path in folder.iterdir() if _TEMPORARY in path.name] if folder.is_dir() else []


def require_space(folder: Path, needed: int) -> None:
    """Refuse, before anything is written, what the free space of a folder's disk cannot hold.

    Raises:
        OSError: ``needed`` bytes are not free; says how many are.
    """
    free = shutil.disk_usage(folder).free
    if needed > free:
        reason = f"{needed:,} bytes are to be written here, but only {free:,} are free; make room on this disk"
        raise OSError(errno.ENOSPC, reason, str(folder))


def make_folder(path: Path) -> None:
    """Make a folder that is not there, and those above it, so that they stay after a power cut."""
    missing = [folder for folder in (path, *path.parents) if not folder.is_dir()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        fsync_path(folder.parent)


def fsync_tree(root: Path) -> None:
    """Flush a folder with everything below it."""
    for folder, files in walk(root):
        for path in files:
            fsync_path(path)
        fsync_path(folder)


def walk(root: Path) -> Iterator[tuple[Path, list[Path]]]:
    """Every folder from the innermost out, with its files; nothing where there is no ``root``.

    An ``OSError`` is raised, where ``Path.rglob`` would pass over the folder.
    """

    def fail(error: OSError) -> None:
        with naming(root):
            if root.exists():
                raise error

    for folder, _, names in os.walk(root, topdown=False, onerror=fail):
        yield Path(folder), [Path(folder, name) for name in names]


@contextmanager
def locked(folder: Path, *, shared: bool = False, wait: bool = False) -> Iterator[None]:
    """Hold a folder, made if missing, against other processes; the lock ends with this process, however it ends.

    ``shared`` and ``wait`` as in :func:`elmo_stream.system.folder_lock`.

    Raises:
        LockedError: another process holds it.
    """
    make_folder(folder)
    with folder_lock(folder, shared=shared, wait=wait) as free:
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
    with naming(final):
        make_folder(final.parent)
        with temporary_folder(final) as temporary:
            yield temporary
            fsync_tree(temporary)
            os.rename(temporary, final)
        fsync_path(final.parent)


@contextmanager
def temporary_folder(beside: Path) -> Iterator[Path]:
    """A folder that is gone at the end, however that comes; a kill leaves it to the next one ``beside`` this name."""
    folder = _temporary(beside)
    remove(folder)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def list_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file below ``folder``, keyed by its relative POSIX path, for an index or manifest."""
    paths = sorted(path for _, files in walk(folder) for path in files if path.is_file())
    return {path.relative_to(folder).as_posix(): file_entry(path) for path in paths}


class Stream(Protocol):
    """An open file that is read from front to back."""

    def read(self, size: int, /) -> bytes:
        """At most ``size`` bytes; none at the end."""

    def __enter__(self) -> "Stream": ...

    def __exit__(self, *error: Any) -> bool | None: ...


class Readable(Protocol):
    """A folder or file that is read: a local ``Path``, or what stands for one behind a URL."""

    @property
    def name(self) -> str:
        """Last part of its path."""

    def __truediv__(self, name: str, /) -> "Readable": ...

    def open(self, mode: Literal["rb"], /) -> Stream:
        """Open for reading; ``FileNotFoundError`` when it is not there."""


def check_files(folder: Readable, listed: dict[str, dict[str, Any]]) -> None:
    """Compare files with their listed sizes and checksums.

    Raises:
        CorruptError: naming the first file that is missing, cut or altered.
    """
    check_folders([(folder, listed)])


def check_folders(folders: Iterable[tuple[Readable, dict[str, dict[str, Any]]]]) -> None:
    """``check_files`` of many folders, by as many threads as there are CPUs, a file each."""
    files = [(folder / name, entry) for folder, listed in folders for name, entry in listed.items()]
    threads = DaemonThreads(min(available_cpus(), len(files)), "elmo-check")
    checks = [threads.submit(partial(_check_file, path, entry)) for path, entry in files]
    try:
        for check in checks:
            check.result()
    finally:
        for check in checks:
            check.cancel()
        threads.close(seconds=0)


def _check_file(path: Readable, entry: dict[str, Any]) -> None:
    for _ in _checked_pieces(path, entry):
        pass


def copy_listed(source: Readable, target: Path, listed: dict[str, dict[str, Any]]) -> None:
    """Copy listed files to a new folder, comparing them as ``check_files`` does; 64 MiB wait for the disk at most."""
    for name, entry in listed.items():
        path, waiting = target / name, 0
        path.parent.mkdir(parents=True, exist_ok=True)
        with naming(path), open(path, "wb") as out:
            for piece in _checked_pieces(source / name, entry):
                waiting += out.write(piece)
                if waiting >= _FLUSH_BYTES:
                    out.flush()
                    drop_cached(out.fileno())
                    waiting = 0
            out.flush()
            drop_cached(out.fileno())


def read_listed(path: Readable, entry: dict[str, Any]) -> bytes:
    """Content of a file, compared with its entry as ``check_files`` does."""
    return b"".join(_checked_pieces(path, entry))


def _checked_pieces(path: Readable, entry: dict[str, Any]) -> Iterator[bytes]:
    """The content of a file in pieces, a byte beyond its listed size at most; raises at the end when it is another."""
    digest, left = hashlib.sha256(), entry["bytes"] + 1
    try:
        stream = path.open("rb")
    except (FileNotFoundError, IsADirectoryError) as error:
        raise CorruptError(f"{path}: missing, though the index or manifest lists it.") from error
    with naming(path), stream:
        while left and (piece := stream.read(min(left, _READ_BYTES))):
            digest.update(piece)
            left -= len(piece)
            yield piece
    if left != 1:
        found = f"has {entry['bytes'] + 1 - left} bytes" if left else "is longer"
        raise CorruptError(f"{path}: {found} where {entry['bytes']} were written; the file was cut or altered.")
    if digest.hexdigest() != entry["sha256"]:
        raise CorruptError(f"{path}: its checksum differs from the one written; the file is damaged.")
