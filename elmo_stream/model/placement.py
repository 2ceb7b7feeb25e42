"""Where the chunks of the classifier live, decided from sizes alone, before anything is allocated.

As many chunks as fit stay in the memory of the device. The rest lives in page-locked host memory (``pinned``, beside a
GPU only) and, beyond that, in files (``mapped``), and is streamed through a few staging buffers. Streamed chunks are
spread evenly among the resident ones, so that transfers go on while resident chunks are computed.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from elmo_kernels import BLOCK_LABELS, preferred_chunk_labels

from elmo_stream.config import ClassifierConfig
from elmo_stream.model.chunk_layout import ChunkLayout, chunk_layouts

DEVICE, PINNED, MAPPED = "device", "pinned", "mapped"
CPU = torch.device("cpu")
STAGING_BUFFERS = 3
"""One being filled, one computed, one written back."""


@dataclass(frozen=True)
class ChunkPlan:
    """The chunks in label order, and the place of each: ``device``, ``pinned`` or ``mapped``."""

    layouts: tuple[ChunkLayout, ...]
    places: tuple[str, ...]

    @property
    def largest_labels(self) -> int:
        """Labels of the largest chunk."""
        return max(layout.last - layout.first for layout in self.layouts)

    def at(self, place: str) -> tuple[int, ...]:
        """Numbers of the chunks at a place."""
        return tuple(number for number, where in enumerate(self.places) if where == place)

    def bytes_at(self, place: str) -> int:
        """Bytes of the chunks at a place."""
        return sum(self.layouts[number].bytes for number in self.at(place))

    def staging_bytes(self, *places: str) -> int:
        """Bytes of the staging buffers for the chunks at some places."""
        sizes = [self.layouts[number].bytes for place in places for number in self.at(place)]
        return min(STAGING_BUFFERS, len(sizes)) * max(sizes, default=0)


def chunk_size(chunk_labels: int) -> int:
    """Labels of a chunk for a number that was asked for: whole blocks."""
    return -(-chunk_labels // BLOCK_LABELS) * BLOCK_LABELS


def plan_chunks(
    num_labels: int,
    dim: int,
    config: ClassifierConfig,
    *,
    device: torch.device = CPU,
    device_room: int | None = None,
    host_room: int | None = None,
) -> ChunkPlan:
    """Place the chunks so that as many as possible stay on the device; whether that fits is for the caller to see.

    Where even the staging buffers have no room, all chunks are streamed: the leanest plan.

    Args:
        device: chooses the labels of a chunk where ``config`` does not.
        device_room: bytes for resident chunks and staging buffers in the memory of the device; None is enough for all.
        host_room: bytes of host memory beside a GPU for pinned chunks and the staging buffers of mapped ones; None on a
            CPU, where the host's memory is the device's.
    """
    labels = chunk_size(config.chunk_labels or preferred_chunk_labels(device, dim))
    layouts = tuple(chunk_layouts(num_labels, dim, config, labels))
    places = [DEVICE] * len(layouts)
    streamed = [] if device_room is None else _overflow(range(len(layouts)), layouts, device_room)
    mapped = streamed if host_room is None else _overflow(streamed, layouts, host_room)
    for place, numbers in ((PINNED, streamed), (MAPPED, mapped)):
        for number in numbers:
            places[number] = place
    return ChunkPlan(layouts, tuple(places))


def _overflow(numbers: Sequence[int], layouts: Sequence[ChunkLayout], room: int) -> Sequence[int]:
    """The fewest of the chunks that must leave, so that the others and staging buffers for those that leave fit."""

    sizes = {number: layouts[number].bytes for number in numbers}
    total = sum(sizes.values())

    def fits(leaving: int) -> bool:
        gone = [sizes[number] for number in _spread(numbers, leaving)]
        return total - sum(gone) + min(STAGING_BUFFERS, leaving) * max(gone, default=0) <= room

    if not numbers or fits(0):
        return []
    low, high = 1, len(numbers)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle + 1, high)
    return _spread(numbers, low)


def _spread(numbers: Sequence[int], count: int) -> list[int]:
    """``count`` of the numbers, evenly spread, the last one among them."""
    total = len(numbers)
    return [number for i, number in enumerate(numbers) if (i + 1) * count // total > i * count // total]
