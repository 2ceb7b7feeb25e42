"""Chunks on their way between page-locked host memory and a GPU: copies in and out run beside the computation.

Three streams (copy in, compute, copy out) meet in events only; the host waits for none of them.
"""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch
from elmo_kernels import ChunkWeights
from torch import Tensor

from elmo_stream.model.chunk_layout import ChunkLayout, aligned_memory


@dataclass
class HostCopy:
    """Page-locked bytes of a chunk; ``settled`` is reached when the last copy between them and the GPU is done."""

    memory: Tensor
    settled: torch.cuda.Event | None = None

    def wait(self) -> None:
        """Hold up the host until the bytes are those of the last step."""
        if self.settled is not None:
            self.settled.synchronize()


@dataclass
class _Buffer:
    memory: Tensor
    free: torch.cuda.Event | None = None


class DeviceStaging:
    """Staging buffers on a GPU, used in turn; a buffer is filled again only after its copy out."""

    def __init__(self, count: int, size: int, device: torch.device) -> None:
        self._buffers = deque(_Buffer(aligned_memory(size, device)) for _ in range(count))
        self._device = device
        self._in, self._out = torch.cuda.Stream(device), torch.cuda.Stream(device)

    @contextmanager
    def borrowed(self, layout: ChunkLayout, host: HostCopy, *, changed: bool) -> Iterator[ChunkWeights]:
        """The chunk on the GPU for operations of the current stream; a changed one is copied back to ``host``."""
        buffer, size = self._buffers[0], layout.bytes
        self._buffers.rotate(-1)
        compute = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._in):
            for event in (buffer.free, host.settled):
                if event is not None:
                    self._in.wait_event(event)
            buffer.memory[:size].copy_(host.memory[:size], non_blocking=True)
            arrived = self._in.record_event()
        compute.wait_event(arrived)
        try:
            yield layout.view(buffer.memory)
        finally:
            computed = compute.record_event()
            with torch.cuda.stream(self._out):
                self._out.wait_event(computed)
                if changed:
                    host.memory[:size].copy_(buffer.memory[:size], non_blocking=True)
                buffer.free = host.settled = self._out.record_event()


class PageLocked:
    """Page-locked host memory of exactly the size asked for (torch's own allocator rounds up to powers of two)."""

    def __init__(self, size: int) -> None:
        self.memory = aligned_memory(size, torch.device("cpu"))
        code = int(torch.cuda.cudart().cudaHostRegister(self.memory.data_ptr(), size, 0))
        if code:
            with suppress(RuntimeError):  # which the next launch would raise, whatever it is
                torch.zeros(1, device="cuda")
            raise MemoryError(f"the system refuses to lock {size:,} bytes of host memory (CUDA error {code})")

    def close(self) -> None:
        """Unlock the memory; copies must be done."""
        torch.cuda.cudart().cudaHostUnregister(self.memory.data_ptr())
