"""The tensors of a chunk in one run of bytes, so that a chunk is moved with one copy, read or write.

Shapes: L labels of a chunk, D features.
"""

import mmap
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from functools import cached_property, lru_cache
from math import prod
from types import MappingProxyType
from typing import Any

import elmo_kernels
import torch
from elmo_kernels import ChunkWeights
from torch import Tensor

from elmo_stream.config import ClassifierConfig

ALIGNMENT = 4096
"""Reads and writes past the page cache move whole pages."""
_TENSOR_ALIGNMENT = 64


@dataclass(frozen=True)
class ChunkLayout:
    """Where each tensor of the chunk of labels ``[first, last)`` lies; ``kahan_rows`` rows carry a compensation."""

    format: str
    dim: int
    first: int
    last: int
    kahan_rows: int

    @cached_property
    def _template(self) -> ChunkWeights:
        return elmo_kernels.empty_chunk(
            self.format, self.last - self.first, self.dim, self.first, kahan_rows=self.kahan_rows, device="meta"
        )

    @property
    def sizes(self) -> Mapping[str, int]:
        """Bytes of each stored tensor by its name in checkpoints."""
        return _sizes(self.format, self.dim, self.last - self.first, self.kahan_rows)[0]

    @property
    def bytes(self) -> int:
        """Bytes of the chunk, whole pages."""
        return _sizes(self.format, self.dim, self.last - self.first, self.kahan_rows)[1]

    def view(self, memory: Tensor) -> ChunkWeights:
        """The chunk whose tensors lie in ``memory``, uint8, at least ``bytes`` long."""
        views: dict[str, Any] = {}
        start = 0
        for name, tensor in _tensor_fields(self._template).items():
            size = _bytes_of(tensor)
            views[name] = memory[start : start + size].view(tensor.dtype).view(tensor.shape)
            start += _rounded(size, _TENSOR_ALIGNMENT)
        return replace(self._template, **views)


@lru_cache(maxsize=64)
def _sizes(format: str, dim: int, labels: int, kahan_rows: int) -> tuple[Mapping[str, int], int]:
    """Bytes of each tensor of a chunk, and of all. Plans ask for those of a million chunks, of which few differ."""
    template = ChunkLayout(format, dim, 0, labels, kahan_rows)._template
    sizes = {name: _bytes_of(tensor) for name, tensor in chunk_tensors(template).items()}
    return MappingProxyType(sizes), _rounded(sum(_rounded(s, _TENSOR_ALIGNMENT) for s in sizes.values()), ALIGNMENT)


def chunk_layouts(num_labels: int, dim: int, config: ClassifierConfig, chunk_labels: int) -> list[ChunkLayout]:
    """The chunks of a classifier, in the order of their labels."""
    kahan_labels = int(config.kahan_share * num_labels)
    return [
        ChunkLayout(
            config.format,
            dim,
            first,
            min(first + chunk_labels, num_labels),
            max(0, min(kahan_labels, first + chunk_labels, num_labels) - first),
        )
        for first in range(0, num_labels, chunk_labels)
    ]


_STORED = {"data": "weight", "exponent": "exponent", "comp": "compensation"}
"""First word of a field of ``ChunkWeights`` -> name of its tensor in checkpoints."""


def chunk_tensors(chunk: ChunkWeights) -> dict[str, Tensor]:
    """The stored tensors of a chunk by name; each has one row a label."""
    return {_STORED[field.partition("_")[0]]: tensor for field, tensor in _tensor_fields(chunk).items() if len(tensor)}


def _tensor_fields(chunk: ChunkWeights) -> dict[str, Tensor]:
    values = {field.name: getattr(chunk, field.name) for field in fields(chunk)}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def _bytes_of(tensor: Tensor) -> int:
    return prod(tensor.shape) * tensor.element_size()


def _rounded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def aligned_memory(size: int, device: torch.device) -> Tensor:
    """uint8 memory that starts at a page, not yet touched on a CPU."""
    if device.type != "cpu":
        return torch.empty(size, dtype=torch.uint8, device=device)
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8)
    # The kernel's work of moving files past the page cache grows with the number of pages.
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)
