"""A classifier's step over all chunks as one CUDA graph, where all chunks stay on the GPU: the host launches once.

A graph reads and writes fixed memory, so a step copies its batch there. There is a graph for each size of a batch (B)
and each power of two that holds its positives (P); their temporaries share one pool of memory.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import elmo_kernels
import torch
from elmo_kernels import Positives
from torch import Tensor

from elmo_stream.model.placement import DEVICE, ChunkPlan

MAX_GRAPHS = 8
"""Batches of further shapes are launched kernel by kernel."""
MIN_CAPACITY = 256
NO_LABEL = -1

Run = Callable[[Tensor, Tensor, Positives], object]
"""All chunks, given x_BD as ``elmo_kernels.operand``, dx_BD to add to, and positives. It never waits for the GPU."""


def suits_graphs(plan: ChunkPlan, device: torch.device) -> bool:
    """Whether each step is the same launches on the same memory, none of which waits."""
    return device.type == "cuda" and elmo_kernels.backend_name(device) == "triton" and set(plan.places) == {DEVICE}


def _capacity(positives: Positives) -> int:
    return max(MIN_CAPACITY, 1 << (len(positives.label_P) - 1).bit_length())


@dataclass(frozen=True, slots=True)
class PaddedPositives:
    """Positives in memory of fixed size: behind all that ``block_ptr`` points to, labels are -1, which no chunk has."""

    label_P: Tensor
    instance_P: Tensor
    weight_P: Tensor
    block_ptr: Tensor

    @classmethod
    def empty_like(cls, positives: Positives) -> "PaddedPositives":
        """Room for as many positives or more, a power of two."""
        label_P, instance_P = positives.label_P.new_zeros(2, _capacity(positives))
        weight_P = positives.weight_P.new_zeros(len(label_P))
        return cls(label_P, instance_P, weight_P, torch.empty_like(positives.block_ptr))

    def fill_(self, positives: Positives) -> None:
        """Copy positives here."""
        count = len(positives.label_P)
        for name in ("label_P", "instance_P", "weight_P"):
            getattr(self, name)[:count].copy_(getattr(positives, name))
        self.label_P[count:] = NO_LABEL
        self.block_ptr.copy_(positives.block_ptr)


@dataclass(slots=True)
class _Shape:
    x_BD: Tensor
    dx_BD: Tensor
    positives: PaddedPositives
    graph: torch.cuda.CUDAGraph | None = None

    @classmethod
    def like(cls, x_BD: Tensor, positives: Positives) -> "_Shape":
        padded = PaddedPositives.empty_like(positives)
        return cls(torch.empty_like(x_BD), torch.empty_like(x_BD, dtype=torch.float32), padded)

    def run(self, run: Run) -> None:
        run(self.x_BD, self.dx_BD.zero_(), self.positives)


class StepGraphs:
    """The graphs of one classifier, made as shapes of batches occur."""

    def __init__(self) -> None:
        self._shapes: dict[tuple[int, int], _Shape] = {}
        self._pool: Any = None
        self._works = True

    def step(self, run: Run, x_BD: Tensor, positives: Positives) -> Tensor:
        """Run a step on operands and return dx_BD, float32, which the next step of the same shape overwrites.

        The first step of a shape compiles its kernels, the second is captured; later ones never wait for the GPU.
        """
        key = len(x_BD), _capacity(positives)
        known = self._shapes.get(key)
        shape = known or _Shape.like(x_BD, positives)
        shape.x_BD.copy_(x_BD)
        shape.positives.fill_(positives)
        if known is not None and known.graph is None:
            self._capture(known, run)
        shape.run(run) if shape.graph is None else shape.graph.replay()
        if self._works and len(self._shapes) < MAX_GRAPHS:
            self._shapes[key] = shape
        return shape.dx_BD

    def _capture(self, shape: _Shape, run: Run) -> None:
        """Record the launches, of which none runs yet. Where that fails, no graph is used any more."""
        try:
            graph = torch.cuda.CUDAGraph()
            stream = torch.cuda.stream(torch.cuda.current_stream())  # a capture that fails stays on its own stream
            # Other threads may go on to allocate page-locked memory.
            with stream, torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                shape.run(run)
        except RuntimeError as error:
            self.close()
            reason = str(error).strip().partition("\n")[0]
            warnings.warn(f"no CUDA graph of the classifier's step ({reason}); steps go on without.", stacklevel=2)
        else:
            shape.graph, self._pool = graph, graph.pool()

    def close(self) -> None:
        """Free the graphs and their memory; later steps are launched kernel by kernel."""
        self._works = False
        self._shapes.clear()
