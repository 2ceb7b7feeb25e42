"""Mapped chunks on their way: a thread reads ahead into staging buffers, another writes back in order.

The chunks are used in one order, over and over; the reader goes round without end, as far ahead as there are buffers.
The contract is that of LLMQ (arXiv 2512.15306): every buffer carries the number of a chunk and its version, and a
version is read from the disk only after the version before it was used and, where it was changed, written. So a chunk
in flight is never read, however short the round.
"""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from elmo_stream.model.scratch import ScratchFiles


@dataclass
class Staged:
    """A staging buffer with the chunk that it holds.

    ``version`` counts the uses of the chunk before this one; ``wait``, where the user sets it, returns when a GPU is
    done with the buffer.
    """

    memory: Tensor
    number: int = -1
    version: int = -1
    changed: bool = False
    wait: Callable[[], None] | None = None


class ChunkReader:
    """Hands out the chunks ``numbers`` in their order, round after round.

    Args:
        memories: staging buffers, page-aligned uint8, each large enough for every chunk.
    """

    def __init__(self, files: ScratchFiles, numbers: Sequence[int], memories: Sequence[Tensor]) -> None:
        self._files, self._numbers = files, tuple(numbers)
        self._free = deque(Staged(memory) for memory in memories)
        self._ready: deque[Staged] = deque()
        self._used: deque[Staged] = deque()
        self._uses = dict.fromkeys(numbers, 0)
        self._state = threading.Condition()
        self._error: BaseException | None = None
        self._closed = False
        self._next = 0
        self._threads = [
            threading.Thread(target=self._guarded, args=(work,), name=f"elmo-chunks-{name}", daemon=True)
            for name, work in (("read", self._read), ("write", self._write))
        ]
        for thread in self._threads:
            thread.start()

    @property
    def at_start(self) -> bool:
        """Whether the next chunk is the first of a round."""
        return self._next % len(self._numbers) == 0

    def get(self) -> Staged:
        """The next chunk; waits until it is read.

        Raises:
            OSError: reading or writing failed.
            CorruptError: a scratch file was cut or removed.
        """
        with self._state:
            self._wait_for(lambda: bool(self._ready))
            self._raise()
            staged = self._ready.popleft()
            expected = self._numbers[self._next % len(self._numbers)]
            if (staged.number, staged.version) != (expected, self._uses[expected]):
                raise RuntimeError(f"chunk {staged.number}, version {staged.version}, where {expected} was due")
            self._next += 1
            return staged

    def release(self, staged: Staged, *, changed: bool) -> None:
        """Give a chunk back; a changed one is written."""
        with self._state:
            staged.changed = changed
            if changed or staged.wait:
                self._used.append(staged)
            else:
                self._finish(staged)
            self._state.notify_all()

    def close(self) -> None:
        """End the threads; what is not written yet is lost with the scratch files."""
        with self._state:
            self._closed = True
            self._state.notify_all()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()

    def _read(self) -> None:
        version = 0
        while True:
            for number in self._numbers:
                with self._state:
                    # A version exists on the disk once all uses before it are finished.
                    self._wait_for(partial(self._readable, number, version))
                    if self._stopped:
                        return
                    staged = self._free.popleft()
                self._files.read_into(number, staged.memory)
                staged.number, staged.version = number, version
                with self._state:
                    self._ready.append(staged)
                    self._state.notify_all()
            version += 1

    def _readable(self, number: int, version: int) -> bool:
        return bool(self._free) and self._uses[number] == version

    def _write(self) -> None:
        while True:
            with self._state:
                self._wait_for(lambda: bool(self._used))
                if self._stopped:
                    return
                staged = self._used.popleft()
            if staged.wait:
                staged.wait()
            if staged.changed:
                self._files.write(staged.number, staged.memory)
            with self._state:
                self._finish(staged)
                self._state.notify_all()

    def _finish(self, staged: Staged) -> None:
        self._uses[staged.number] += 1
        staged.wait = None
        self._free.append(staged)

    @property
    def _stopped(self) -> bool:
        return self._closed or self._error is not None

    def _wait_for(self, condition: Callable[[], bool]) -> None:
        self._state.wait_for(lambda: self._stopped or condition())

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error
        if self._closed:
            raise ValueError("the chunks are closed")

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            with self._state:
                self._error = error
                self._state.notify_all()
