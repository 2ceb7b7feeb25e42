"""Stores behind a URL (``http://``, ``s3://``, ... whatever fsspec opens): read, never written.

The index, the labels, the tokenizer and the filters are small: they are copied, once and checked, to a folder of the
cache, which stands for the store from then on. Shards stay where they are; each is read whole when its rows are needed.
"""

import errno
import hashlib
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal, Self, TypeVar

from elmo_stream.data.index import FILTERS, INDEX_NAME, StoreIndex
from elmo_stream.errors import UserError
from elmo_stream.files import (
    MAX_JSON_BYTES,
    Readable,
    copy_listed,
    new_folder,
    read_json,
    write_bytes_durably,
    write_json_durably,
)

_REMOTE_NAME = "remote.json"
_READ_BYTES = 1 << 20
_WAITS = (0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.0, 2.0)  # seconds, between ten tries
_PASSING = (408, 425, 429)  # of the client errors of HTTP: too slow, too early, too many
Result = TypeVar("Result")
_HOW = "pip install 'elmo-stream[remote]' brings http(s); other protocols need the package that fsspec names"


def is_url(place: str) -> bool:
    """Whether a place is a URL rather than a path."""
    return "://" in place


def local_store(place: str) -> Path:
    """The folder to open a store by: a path as it is, for a URL one in the cache that knows where the shards are.

    The cache is ``$XDG_CACHE_HOME/elmo-stream/stores`` (by default under ``~/.cache``). A store that was replaced at
    the same URL gets another folder.

    Raises:
        UserError: nothing there, no store, or a protocol that fsspec cannot open here.
        CorruptError: the index, the labels, the tokenizer or the filters are damaged.
        OSError: the place cannot be reached.
    """
    if not is_url(place):
        return Path(place)
    remote = RemoteFolder(place)
    if place.startswith("file://"):
        return Path(remote.filesystem()[1])
    try:
        with (remote / INDEX_NAME).open("rb") as stream:
            index = bytearray()
            while len(index) <= MAX_JSON_BYTES and (piece := stream.read(_READ_BYTES)):
                index += piece
    except FileNotFoundError as error:
        raise UserError(f"{place}: not a store (no {INDEX_NAME} there).") from error
    digest = hashlib.sha256(place.encode() + b"\n" + index).hexdigest()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "elmo-stream" / "stores" / digest[:32]
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            _copy(remote, bytes(index), folder)
        except (UserError, OSError):
            if not folder.is_dir():  # no other process was faster
                raise
    return folder


def shards_of(store: Path) -> Readable:
    """Where the shards of a store are: in its folder, or behind the URL that its folder stands for."""
    note = store / _REMOTE_NAME
    return RemoteFolder(read_json(note)["url"]) if note.is_file() else store


def _copy(remote: "RemoteFolder", index: bytes, folder: Path) -> None:
    with new_folder(folder) as temporary:
        write_bytes_durably(temporary / INDEX_NAME, index)
        entry = StoreIndex.load(temporary)
        listed = {"labels": entry.labels.files, "tokenizer": entry.tokenizer.files, FILTERS: entry.filters}
        for name, files in listed.items():
            copy_listed(remote / name, temporary / name, files)
        write_json_durably(temporary / _REMOTE_NAME, {"url": remote.url})


@dataclass(frozen=True)
class RemoteFolder:
    """A folder or file behind a URL, as :class:`elmo_stream.files.Readable`."""

    url: str

    @property
    def name(self) -> str:
        """Last part of the URL."""
        return self.url.rstrip("/").rpartition("/")[2]

    def __truediv__(self, name: str) -> "RemoteFolder":
        return RemoteFolder(f"{self.url.rstrip('/')}/{name}")

    def __str__(self) -> str:
        return self.url

    def filesystem(self) -> tuple[Any, str]:
        """(file system of fsspec, path in it).

        Raises:
            UserError: the protocol is unknown, or its package is not installed.
        """
        try:
            import fsspec

            filesystem, path = fsspec.core.url_to_fs(self.url)
        except (ImportError, ValueError) as error:
            raise UserError(f"{self.url}: cannot be opened ({error}); {_HOW}.") from error
        return filesystem, path

    def open(self, mode: Literal["rb"]) -> "_RemoteFile":
        """Open for reading from front to back.

        Raises:
            FileNotFoundError: it is not there.
            OSError: it cannot be reached, however often that is tried.
        """
        return _RemoteFile(self)


class _RemoteFile:
    """Reads a remote file; an answer that fails or breaks off is asked for again, from where it broke off."""

    def __init__(self, place: RemoteFolder) -> None:
        self._place, self._position = place, 0
        self._in_parts = True
        self._stream: IO[bytes] | None = None
        self._insist(self._open)

    def read(self, size: int) -> bytes:
        """At most ``size`` bytes; none at the end."""
        piece = self._insist(lambda: self._open().read(size))
        self._position += len(piece)
        return piece

    def _open(self) -> IO[bytes]:
        """The stream, opened anew where it failed, at the byte to be read next."""
        if self._stream is None:
            filesystem, path = self._place.filesystem()
            options = {"cache_type": "none"} if self._in_parts else {"block_size": 0}
            stream = filesystem.open(path, "rb", **options)
            if self._in_parts:
                stream.seek(self._position)
            else:
                _skip(stream, self._position)
            self._stream = stream
        return self._stream

    def _insist(self, call: Callable[[], Result]) -> Result:
        """What the call gives, tried again after each of the waits where the failure may pass."""
        waits = iter(_WAITS)
        while True:
            try:
                return call()
            except UserError:
                raise
            except Exception as error:  # every protocol has its own kinds
                self._close()
                if self._in_parts and isinstance(error, ValueError):  # a server that gives no parts of a file
                    self._in_parts = False
                    continue
                # fsspec says "not found" of a server that is down or refuses, too; the cause tells.
                cause = error.__cause__ if isinstance(error, FileNotFoundError) and error.__cause__ else error
                status = getattr(cause, "status", 0)
                if isinstance(error, FileNotFoundError) and (cause is error or status == 404):
                    raise
                final = isinstance(error, PermissionError) or (400 <= status < 500 and status not in _PASSING)
                wait = None if final else next(waits, None)
                if wait is None:
                    raise _unreachable(self._place.url, cause) from error
                time.sleep(wait)

    def _close(self) -> None:
        stream, self._stream = self._stream, None
        if stream is not None:
            with suppress(Exception):  # it failed before
                stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()


def _skip(stream: IO[bytes], size: int) -> None:
    while size:
        skipped = len(stream.read(min(size, _READ_BYTES)))
        if not skipped:
            raise OSError(errno.EIO, "the answer is shorter than the one before")
        size -= skipped


def _unreachable(url: str, error: BaseException) -> OSError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return OSError(errno.EIO, f"cannot be read ({reason})", url)
