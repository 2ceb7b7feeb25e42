"""Time every operation of the classifier in every format beside the bound of this machine, and the peer's step.

    python -m tools.bench_kernels --json kernels.json
    python -m tools.bench_kernels --peer ../elmo --formats fp8 bf16 --shapes 2812281x768x128
    python -m tools.bench_kernels --device cpu --tiny        # try the code: sizes and times mean nothing

The bound of a row is the least time of its bytes and operations at the rates that ``tools.roofline`` measures
first: weights are read once by the gradient of the logits and by the top-k, read and written once by the update
and by a whole step; products take 2, 4 (the update) or 6 (the step) operations a weight and instance. ``share``
is bound / time. Columns ``MiB`` are memory of the allocator beyond weights and inputs. A shape that does not fit
is cut to the labels that fit. Where ``run`` is "graph", a captured CUDA graph is replayed.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import elmo_kernels as ek
import torch
from torch import Tensor

from elmo_stream.config import ClassifierConfig
from elmo_stream.model.classifier import ChunkedClassifier
from tools import roofline
from tools.batches import DECAY, LR, PRIOR_LOGIT, PRIOR_SHARE, SEED, STD, Batch, Shape, make_batch
from tools.measuring import MIB, Work, attempt, captured, finish, median_ms, parser, said, transient_bytes, write_json
from tools.peer import PEER_FORMATS, peer_step
from tools.roofline import Roofline
from tools.tables import Row, table

COLUMNS = ("op", "format", "labels", "dim", "batch", "ms", "bound", "share", "MiB", "run")
SHAPES = [Shape(670_091, 768, 128), Shape(2_812_281, 768, 128), Shape(1_305_265, 768, 512), Shape(8_623_847, 768, 128)]
SHAPES += [Shape(8_623_847, 768, 2048)]
TINY_SHAPES = [Shape(1300, 80, 5)]
FITS_SHARE = 0.6
"""Share of the free memory that weights may take; the rest is for what an operation needs."""
TOP_K = 100
KAHAN_BYTES = 2
BYTES = {"fp32": 4.0, "bf16": 2.0, "fp8": 1.0 + 1.0 / ek.GROUP_FEATURES}


def fitting(shape: Shape, fmt: str, kahan_head: float, device: torch.device) -> Shape:
    """The shape, with as many of its labels as fit into the free memory of the device."""
    if device.type != "cuda":
        return shape
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    most = int(FITS_SHARE * free / ((BYTES[fmt] + KAHAN_BYTES * kahan_head) * shape.dim))
    return Shape(min(shape.labels, most), shape.dim, shape.batch)


class Bench:
    """The weights of all chunks with a batch, and the work of each operation over them."""

    def __init__(self, shape: Shape, fmt: str, kahan_head: float, device: torch.device) -> None:
        self.batch = make_batch(shape, device)
        self.operand_BD = ek.operand(self.batch.x_BD, fmt)
        self.scalars = ek.step_scalars(device, lr=LR, weight_decay=DECAY, seed=SEED, step=1)
        self.flags = torch.zeros(2, dtype=torch.int64, device=device)
        head = int(kahan_head * shape.labels)
        size = ek.preferred_chunk_labels(device, shape.dim)
        self.chunks = [
            ek.make_chunk(
                fmt, last - first, shape.dim, first,
                seed=SEED, std=STD, kahan_rows=max(0, min(last, head) - first), device=device,
            )
            for first in range(0, shape.labels, size)
            for last in [min(first + size, shape.labels)]
        ]  # fmt: skip
        # Chunks of a size share a gradient: held for every label, it would not fit.
        self.gradients = {len(chunk.data_LD): self._gradient(chunk) for chunk in self.chunks[-2:]}

    def _gradient(self, chunk: ek.ChunkWeights) -> Tensor:
        return ek.logit_grad(chunk, self.operand_BD, self.batch, loss="bce", prior=PRIOR_LOGIT)[0]

    def logit_grad(self) -> None:
        """Gradient of the logits of every chunk."""
        for chunk in self.chunks:
            self._gradient(chunk)

    def update(self) -> None:
        """Weight update and gradient of the embeddings of every chunk."""
        dx_BD = torch.zeros_like(self.batch.x_BD)
        for chunk in self.chunks:
            ek.update_with_(
                chunk, self.gradients[len(chunk.data_LD)], self.operand_BD, dx_BD,
                scalars=self.scalars, rounding="stochastic", flags=self.flags,
            )  # fmt: skip

    def topk(self) -> None:
        """The best labels of every instance."""
        batch, device = len(self.operand_BD), self.operand_BD.device
        scores_BK = torch.full((batch, TOP_K), -torch.inf, device=device)
        ids_BK = torch.full((batch, TOP_K), -1, device=device)
        for chunk in self.chunks:
            ek.topk_merge_(scores_BK, ids_BK, chunk, self.operand_BD)


@dataclass(frozen=True)
class Operation:
    """What is timed, and its bound: passes over the weights, and operations a weight and instance."""

    name: str
    passes: int
    products: int
    work: Callable[[Bench], None]


OPERATIONS = (
    Operation("logit_grad", 1, 2, Bench.logit_grad),
    Operation("update", 2, 4, Bench.update),
    Operation(f"top-{TOP_K}", 1, 2, Bench.topk),
)
STEP_PASSES, STEP_PRODUCTS = 2, 6


def bound_ms(shape: Shape, fmt: str, kahan_head: float, passes: int, products: int, rates: Roofline) -> float:
    """The least time of so many passes over the weights and operations a weight and instance.

    A second pass writes the weights; then the compensations are read and written too.
    """
    weights = shape.labels * shape.dim
    data = weights * (passes * BYTES[fmt] + (2 * KAHAN_BYTES * kahan_head if passes > 1 else 0))
    return rates.bound_ms(data=data, operations=products * weights * shape.batch, fmt=fmt)


def rows_of(shape: Shape, fmt: str, kahan_head: float, rates: Roofline, options: argparse.Namespace) -> Iterator[Row]:
    """A row for each operation, for a training step and, on a GPU, for a step that must not wait and the peer's."""
    device: torch.device = options.device
    shape = fitting(shape, fmt, kahan_head, device)
    name = f"{fmt}+kahan" if kahan_head else fmt
    row = {"format": name, "labels": shape.labels, "dim": shape.dim, "batch": shape.batch}

    def timed(work: Work, passes: int, products: int, capture: bool) -> Row:
        memory = transient_bytes(work, device)
        chosen, how = captured(work, device) if capture else (work, "trainer")
        ms = median_ms(chosen, device, repeats=options.repeats)
        bound = bound_ms(shape, fmt, kahan_head, passes, products, rates)
        return {"ms": ms, "bound": bound, "share": bound / ms, "MiB": memory and memory / MIB, "run": how}

    def operations() -> Iterator[Row]:
        bench = Bench(shape, fmt, kahan_head, device)
        for op in OPERATIONS:
            work = partial(op.work, bench)
            yield attempt({"op": op.name, **row}, partial(timed, work, op.passes, op.products, True))

    def steps() -> Iterator[Row]:
        config = ClassifierConfig(format=fmt, kahan_head=kahan_head, weight_decay=DECAY)
        classifier = ChunkedClassifier(shape.labels, shape.dim, config, prior=PRIOR_SHARE, seed=SEED, device=device)
        batch = make_batch(shape, device)
        step = partial(classifier.train_step, batch.x_BD, batch, lr=LR, step=1)
        own = attempt({"op": "step", **row}, partial(timed, step, STEP_PASSES, STEP_PRODUCTS, False))
        yield own
        if device.type == "cuda":
            yield attempt({"op": "step, no waiting", **row}, partial(without_waiting, step))
        del classifier, step
        if options.peer and fmt in PEER_FORMATS and not kahan_head:
            yield attempt(
                {"op": "step of the peer", **row}, partial(_time_peer, shape, fmt, batch, own.get("ms"), options)
            )

    for part, rows in (("operations", operations()), ("step", steps())):
        try:
            yield from rows
        except Exception as error:  # the weights of this shape could not be made: the other rows go on
            yield {"op": part, **row, "error": said(error)}


def _time_peer(shape: Shape, fmt: str, batch: Batch, own_ms: float | None, options: argparse.Namespace) -> Row:
    work = peer_step(options.peer, fmt, shape.labels, batch.x_BD, batch.label_P, batch.instance_P, LR)
    memory = transient_bytes(work, options.device)
    ms = median_ms(work, options.device, repeats=options.repeats)
    ratio = f"{ms / own_ms:.2f} x ours" if own_ms else "eager"
    return {"ms": ms, "MiB": memory and memory / MIB, "run": ratio}


def without_waiting(step: Work) -> Row:
    """A step in which torch refuses every wait of the host for the GPU."""
    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return {"run": "passed"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; 1 when a row failed."""
    options = _parser().parse_args(arguments)
    shapes = TINY_SHAPES if options.tiny else options.shapes
    rates = roofline.measure(options.device, tiny=options.tiny)
    variants = [(fmt, 0.0) for fmt in options.formats]
    if options.kahan_head:
        variants.append(("fp8", options.kahan_head))
    rows = []
    for shape in shapes:
        for fmt, kahan_head in variants:
            for row in rows_of(shape, fmt, kahan_head, rates, options):
                print(table([row], COLUMNS).splitlines()[-1], file=sys.stderr, flush=True)
                rows.append(row)
                write_json(options, rows, columns=COLUMNS, roofline=rates.as_dict())
    return finish(options, rows, COLUMNS, roofline=rates.as_dict())


def _parser() -> argparse.ArgumentParser:
    made = parser(__doc__, tiny="a tiny shape in place of the given ones: tries the code")
    made.add_argument("--shapes", nargs="+", type=Shape.parse, default=SHAPES, metavar="LABELSxDIMxBATCH")
    made.add_argument("--formats", nargs="+", default=list(ek.FORMATS), choices=list(ek.FORMATS))
    made.add_argument("--kahan-head", type=float, default=0.2, help="also fp8 with this share of labels compensated")
    made.add_argument("--repeats", type=int, default=20, help="timed repetitions of a row")
    made.add_argument("--peer", type=Path, metavar="FOLDER", help="a checkout of the official ELMO repository")
    return made


if __name__ == "__main__":
    sys.exit(main())
