"""The chunks of the classifier at the places of their plan, and the way of each through the memory of the device."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from elmo_kernels import ChunkWeights

from elmo_stream.model.chunk_layout import ChunkLayout, aligned_memory
from elmo_stream.model.chunk_reader import ChunkReader, Staged
from elmo_stream.model.device_staging import DeviceStaging, HostCopy, PageLocked
from elmo_stream.model.placement import DEVICE, MAPPED, PINNED, STAGING_BUFFERS, ChunkPlan
from elmo_stream.model.scratch import ScratchFiles
from elmo_stream.system import return_free_memory

CPU = torch.device("cpu")


class ChunkStore:
    """Allocates every chunk at its place and fills it there, one at a time.

    Args:
        scratch: folder for the files of mapped chunks.
        fill_: writes the first values of a chunk into its tensors.

    Raises:
        OSError: no room on the disk, or a folder that cannot be written; names it.
    """

    def __init__(
        self,
        plan: ChunkPlan,
        *,
        device: torch.device,
        scratch: Path | None,
        fill_: Callable[[ChunkLayout, ChunkWeights], None],
    ) -> None:
        self._plan, self._device = plan, device
        self._resident: dict[int, ChunkWeights] = {}
        self._pinned: dict[int, HostCopy] = {}
        self._reader: ChunkReader | None = None
        self._staging: DeviceStaging | None = None
        self._resources = ExitStack()
        # A store that is forgotten ends its threads and removes its files too.
        self._finalizer = weakref.finalize(self, self._resources.close)
        try:
            self._build(scratch, fill_)
        except BaseException:
            self.close()
            raise

    def _build(self, scratch: Path | None, fill_: Callable[[ChunkLayout, ChunkWeights], None]) -> None:
        plan, gpu = self._plan, self._device.type == "cuda"
        if gpu and (count := min(STAGING_BUFFERS, len(plan.at(PINNED)) + len(plan.at(MAPPED)))):
            size = plan.staging_bytes(PINNED, MAPPED) // count
            self._staging = DeviceStaging(count, size, self._device)
        files = None
        if mapped := plan.at(MAPPED):
            if scratch is None:
                raise ValueError("a plan with mapped chunks needs a folder for them")
            files = ScratchFiles(scratch)
            self._resources.callback(files.close)
            for number in mapped:  # a disk without room is found before the work of filling
                files.create(number, plan.layouts[number].bytes)
            size = max(plan.layouts[number].bytes for number in mapped)
            buffers = [self._host_memory(size, locked=gpu) for _ in range(min(STAGING_BUFFERS, len(mapped)))]
        for number, layout in enumerate(plan.layouts):
            if plan.places[number] == DEVICE:
                memory = aligned_memory(layout.bytes, self._device)
                self._resident[number] = layout.view(memory)
            elif plan.places[number] == PINNED:
                memory = self._host_memory(layout.bytes, locked=gpu)
                self._pinned[number] = HostCopy(memory)
            else:
                memory = buffers[0]
            fill_(layout, layout.view(memory))
            return_free_memory()  # else the heap keeps what each chunk was drawn or read with
            if files is not None and plan.places[number] == MAPPED:
                files.write(number, memory)
        if files is not None:
            self._reader = ChunkReader(files, mapped, buffers)
            self._resources.callback(self._reader.close)
        if gpu:
            self._resources.callback(torch.cuda.synchronize, self._device)

    def _host_memory(self, size: int, *, locked: bool) -> torch.Tensor:
        if not locked:
            return aligned_memory(size, CPU)
        piece = PageLocked(size)
        self._resources.callback(piece.close)
        return piece.memory

    def walk(self, *, changed: bool) -> Iterator[ChunkWeights]:
        """Each chunk on the device, in label order, valid until the next one is asked for.

        Args:
            changed: whether the caller changes the chunks; others are not written back.

        Raises:
            OSError: reading or writing failed.
            CorruptError: a scratch file was cut or removed.
        """
        self._finish_broken_walk()
        for number, layout in enumerate(self._plan.layouts):
            if number in self._resident:
                yield self._resident[number]
            elif number in self._pinned:
                assert self._staging is not None
                with self._staging.borrowed(layout, self._pinned[number], changed=changed) as chunk:
                    yield chunk
            else:
                with self._staged(changed=changed) as staged:
                    if self._staging is None:
                        yield layout.view(staged.memory)
                        continue
                    host = HostCopy(staged.memory)
                    staged.wait = host.wait
                    with self._staging.borrowed(layout, host, changed=changed) as chunk:
                        yield chunk

    def walk_host(self) -> Iterator[tuple[ChunkLayout, ChunkWeights]]:
        """Each chunk as the host sees it, for a checkpoint: streamed ones do not pass through the GPU."""
        self._finish_broken_walk()
        for number, layout in enumerate(self._plan.layouts):
            if number in self._resident:
                yield layout, self._resident[number]
            elif number in self._pinned:
                self._pinned[number].wait()
                yield layout, layout.view(self._pinned[number].memory)
            else:
                with self._staged(changed=False) as staged:
                    yield layout, layout.view(staged.memory)

    @contextmanager
    def _staged(self, *, changed: bool) -> Iterator[Staged]:
        assert self._reader is not None
        staged = self._reader.get()
        try:
            yield staged
        finally:
            self._reader.release(staged, changed=changed)

    def _finish_broken_walk(self) -> None:
        """The reader goes round in one order; a walk that was given up is gone through to its end."""
        while self._reader is not None and not self._reader.at_start:
            with self._staged(changed=False):
                pass

    def close(self) -> None:
        """Free the staging memory, end the threads, remove the files; a second call does nothing."""
        self._resident.clear()
        self._pinned.clear()
        self._staging = None
        self._finalizer()
