"""Scratch files of mapped chunks: one file a chunk, all its bytes allotted at once, written in place.

They hold nothing durable (the checkpoint does), so nothing is flushed for the sake of a power cut. They are read and
written past the page cache, which would otherwise fill with chunks that are read once a step. What is read is compared
with a checksum kept in memory since it was written.
"""

import hashlib
import os
import shutil
import tempfile
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from torch import Tensor

from elmo_stream.errors import CorruptError, UserError
from elmo_stream.system import drop_cached, folder_lock, open_direct, reserve_file

_PREFIX = "elmo-stream-scratch-"
_PAGE_WORDS = 512


class ScratchFiles:
    """A folder of this process below ``parent``, removed by ``close``; what killed processes left there goes now.

    Raises:
        OSError: the folder cannot be made or the disk is full; names the place.
        UserError: the operating system cannot do it.
    """

    def __init__(self, parent: Path) -> None:
        if not hasattr(os, "preadv"):
            raise UserError("memory.device: the classifier does not fit, and overflow to disk needs Linux.")
        parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(parent)
        # Locked before it has a name that others would take for a leftover.
        new = Path(tempfile.mkdtemp(prefix=f"new-{_PREFIX}", dir=parent))
        self._lock = ExitStack()
        self._lock.enter_context(folder_lock(new))
        self.folder = new.rename(parent / new.name.removeprefix("new-"))
        self._sizes: dict[int, int] = {}
        self._checksums: dict[int, bytes] = {}

    def create(self, number: int, size: int) -> None:
        """Allot the file of a chunk."""
        reserve_file(self._path(number), size)
        self._sizes[number] = size

    def read_into(self, number: int, memory: Tensor) -> None:
        """Fill ``memory`` (uint8, page-aligned) with a chunk.

        Raises:
            CorruptError: the file was cut or removed by someone else, or holds other bytes than were written.
        """
        self._transfer(number, memory, write=False)
        if self._checksums.get(number) != _checksum(memory[: self._sizes[number]]):
            raise CorruptError(f"{self._path(number)}: holds other bytes than were written; {_ADVICE}")

    def write(self, number: int, memory: Tensor) -> None:
        """Write a chunk from ``memory`` (uint8, page-aligned)."""
        self._checksums[number] = _checksum(memory[: self._sizes[number]])
        self._transfer(number, memory, write=True)

    def _transfer(self, number: int, memory: Tensor, *, write: bool) -> None:
        path, size = self._path(number), self._sizes[number]
        buffer = memory.numpy().data[:size]
        try:
            descriptor = open_direct(path)
        except FileNotFoundError as error:
            raise CorruptError(f"{path}: is gone, though training uses it; {_ADVICE}") from error
        try:
            if os.fstat(descriptor).st_size != size:
                raise CorruptError(f"{path}: has {os.fstat(descriptor).st_size} bytes instead of {size}; {_ADVICE}")
            move, done = (os.pwritev if write else os.preadv), 0
            while done < size:
                moved = move(descriptor, [buffer[done:]], done)
                if moved <= 0:
                    raise CorruptError(f"{path}: ends after {done} of {size} bytes; {_ADVICE}")
                done += moved
            if not hasattr(os, "O_DIRECT"):
                drop_cached(descriptor)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from error
        finally:
            os.close(descriptor)

    def close(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.close()

    def _path(self, number: int) -> Path:
        return self.folder / f"chunk-{number:05d}"


def _checksum(memory: Tensor) -> bytes:
    """A digest of the sums of all pages: as fast as memory, and any flipped bit changes one of the sums."""
    words = memory.numpy().view(np.uint64)
    page_starts = np.arange(0, len(words), _PAGE_WORDS)
    return hashlib.blake2b(np.add.reduceat(words, page_starts).tobytes(), digest_size=16).digest()


_ADVICE = "go on from the last checkpoint with `elmo-stream resume`."


def _remove_leftovers(parent: Path) -> None:
    for folder in [*parent.glob(f"{_PREFIX}*"), *parent.glob(f"new-{_PREFIX}*")]:
        try:
            with folder_lock(folder) as free:
                if free:
                    shutil.rmtree(folder, ignore_errors=True)
        except OSError:  # another process was faster
            continue
