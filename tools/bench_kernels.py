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
from tools.measuring import MIB, Row, attempt, captured, finish, median_ms, parser, said, table, transient_bytes
from tools.peer import PEER_FORMATS, peer_step
from tools.roofline import Roofline

COLUMNS = ("op", "format", "labels", "dim", "batch", "ms", "bound", "share", "MiB", "run")
SHAPES = ("670091x768x128", "2812281x768x128", "1305265x768x512", "8623847x768x128", "8623847x768x2048")
TINY_SHAPES = ("1300x80x5", "2049x48x32")
FITS_SHARE = 0.6
"""Share of the free memory that weights may take; the rest is for what an operation needs."""
TOP_K = 100
POSITIVES_A_ROW = 5
PRIOR_SHARE, PRIOR_LOGIT, LR, DECAY, SEED = 1e-4, -9.2, 1e-3, 1e-4, 0
BYTES = {"fp32": 4.0, "bf16": 2.0, "fp8": 1.0 + 1.0 / ek.GROUP_FEATURES}


@dataclass(frozen=True)
class Shape:
    """Labels, features and instances of a row."""

    labels: int
    dim: int
    batch: int

    @classmethod
    def parse(cls, text: str) -> "Shape":
        """From "LABELSxDIMxBATCH"."""
        labels, dim, batch = map(int, text.split("x"))
        return cls(labels, dim, batch)


@dataclass(frozen=True)
class Batch:
    """Embeddings and sorted positives, as ``elmo_kernels.Positives`` describes them."""

    x_BD: Tensor
    label_P: Tensor
    instance_P: Tensor
    weight_P: Tensor
    block_ptr: Tensor


def make_batch(shape: Shape, device: torch.device) -> Batch:
    """Random embeddings of unit mean square, and a few random labels an instance."""
    generator = torch.Generator().manual_seed(SEED)
    count = shape.batch * POSITIVES_A_ROW
    label_P = torch.randint(shape.labels, (count,), generator=generator)
    pair_P = (label_P * shape.batch + torch.arange(count) % shape.batch).unique()
    starts = torch.arange(-(-shape.labels // ek.BLOCK_LABELS) + 1) * ek.BLOCK_LABELS
    label_P = pair_P // shape.batch
    return Batch(
        x_BD=torch.randn(shape.batch, shape.dim, generator=generator).to(device),
        label_P=label_P.to(device),
        instance_P=(pair_P % shape.batch).to(device),
        weight_P=torch.ones(len(pair_P), device=device),
        block_ptr=torch.searchsorted(label_P, starts).to(device),
    )


def fitting(shape: Shape, fmt: str, device: torch.device) -> Shape:
    """The shape, with as many of its labels as fit into the free memory of the device."""
    if device.type != "cuda":
        return shape
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    most = int(FITS_SHARE * free / (BYTES[fmt] * shape.dim))
    return Shape(min(shape.labels, most), shape.dim, shape.batch)


class Bench:
    """One classifier with a batch: the work of each operation over all of its chunks."""

    def __init__(self, shape: Shape, fmt: str, kahan_head: float, device: torch.device) -> None:
        config = ClassifierConfig(format=fmt, kahan_head=kahan_head, weight_decay=DECAY)
        self.classifier = ChunkedClassifier(
            shape.labels, shape.dim, config, prior=PRIOR_SHARE, seed=SEED, device=device
        )
        self.batch = make_batch(shape, device)
        self.operand_BD = ek.operand(self.batch.x_BD, fmt)
        self.scalars = ek.step_scalars(device, lr=LR, weight_decay=DECAY, seed=SEED, step=1)
        # Chunks of a size share a gradient: held for every label, it would not fit.
        self.gradients = {len(chunk.data_LD): self._gradient(chunk) for chunk in self.classifier.chunks[-2:]}

    def _gradient(self, chunk: ek.ChunkWeights) -> Tensor:
        return ek.logit_grad(chunk, self.operand_BD, self.batch, loss="bce", prior=PRIOR_LOGIT)[0]

    def logit_grad(self) -> None:
        """Gradient of the logits of every chunk."""
        for chunk in self.classifier.chunks:
            self._gradient(chunk)

    def update(self) -> None:
        """Weight update and gradient of the embeddings of every chunk."""
        dx_BD = torch.zeros_like(self.batch.x_BD)
        for chunk in self.classifier.chunks:
            ek.update_with_(
                chunk, self.gradients[len(chunk.data_LD)], self.operand_BD, dx_BD,
                scalars=self.scalars, rounding="stochastic", flags=self.classifier.flags,
            )  # fmt: skip

    def topk(self) -> None:
        """The best labels of every instance."""
        self.classifier.topk(self.batch.x_BD, TOP_K)

    def step(self) -> None:
        """A training step as the trainer takes it, graph and all."""
        self.classifier.train_step(self.batch.x_BD, self.batch, lr=LR, step=1)


@dataclass(frozen=True)
class Operation:
    """What is timed, and its bound: passes over the weights, and operations a weight and instance."""

    name: str
    passes: int
    products: int
    work: Callable[[Bench], None]
    capture: bool = True


OPERATIONS = (
    Operation("logit_grad", 1, 2, Bench.logit_grad),
    Operation("update", 2, 4, Bench.update),
    Operation(f"top-{TOP_K}", 1, 2, Bench.topk),
    Operation("step", 2, 6, Bench.step, capture=False),
)


def bound_ms(shape: Shape, fmt: str, passes: int, products: int, rates: Roofline) -> float:
    """The least time of so many passes over the weights and operations a weight and instance."""
    weights = shape.labels * shape.dim
    return rates.bound_ms(data=passes * BYTES[fmt] * weights, operations=products * weights * shape.batch, fmt=fmt)


def rows_of(shape: Shape, fmt: str, kahan_head: float, rates: Roofline, options: argparse.Namespace) -> Iterator[Row]:
    """A row for each operation, and on a GPU one for a step that must not wait and one for the peer's step."""
    device: torch.device = options.device
    shape = fitting(shape, fmt, device)
    row = {
        "format": f"{fmt}+kahan" if kahan_head else fmt,
        "labels": shape.labels,
        "dim": shape.dim,
        "batch": shape.batch,
    }
    try:
        bench = Bench(shape, fmt, kahan_head, device)
    except Exception as error:  # reported as the row of this shape
        yield {"op": "make", **row, "error": said(error)}
        return
    own_ms = None
    for operation in OPERATIONS:
        timed = attempt({"op": operation.name, **row}, partial(_time, operation, bench, shape, fmt, rates, options))
        own_ms = timed.get("ms")
        yield timed
    if device.type == "cuda":
        yield attempt({"op": "step, no waiting", **row}, partial(without_waiting, bench))
    batch = bench.batch
    del bench
    if options.peer and fmt in PEER_FORMATS and not kahan_head:
        yield attempt({"op": "step of the peer", **row}, partial(_time_peer, shape, fmt, batch, own_ms, options))


def _time(
    operation: Operation, bench: Bench, shape: Shape, fmt: str, rates: Roofline, options: argparse.Namespace
) -> Row:
    work = partial(operation.work, bench)
    memory = transient_bytes(work, options.device)
    chosen, how = captured(work, options.device) if operation.capture else (work, "trainer")
    ms = median_ms(chosen, options.device, repeats=options.repeats)
    bound = bound_ms(shape, fmt, operation.passes, operation.products, rates)
    return {"ms": ms, "bound": bound, "share": bound / ms, "MiB": None if memory is None else memory / MIB, "run": how}


def _time_peer(shape: Shape, fmt: str, batch: Batch, own_ms: float | None, options: argparse.Namespace) -> Row:
    work = peer_step(options.peer, fmt, shape.labels, batch.x_BD, batch.label_P, batch.instance_P, LR)
    memory = transient_bytes(work, options.device)
    ms = median_ms(work, options.device, repeats=options.repeats)
    ratio = f"{ms / own_ms:.2f} x ours" if own_ms else "eager"
    return {"ms": ms, "MiB": None if memory is None else memory / MIB, "run": ratio}


def without_waiting(bench: Bench) -> Row:
    """A step in which torch refuses every wait of the host for the GPU."""
    bench.step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        bench.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return {"run": "passed"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; 1 when a row failed."""
    options = _parser().parse_args(arguments)
    shapes = [Shape.parse(text) for text in options.shapes or (TINY_SHAPES if options.tiny else SHAPES)]
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
    return finish(options, rows, COLUMNS, roofline=rates.as_dict())


def _parser() -> argparse.ArgumentParser:
    made = parser(__doc__, tiny="two tiny shapes, few repeats: tries the code")
    made.add_argument("--shapes", nargs="+", metavar="LABELSxDIMxBATCH", help=f"default: {' '.join(SHAPES)}")
    made.add_argument("--formats", nargs="+", default=list(ek.FORMATS), choices=list(ek.FORMATS))
    made.add_argument("--kahan-head", type=float, default=0.2, help="also fp8 with this share of labels compensated")
    made.add_argument("--repeats", type=int, default=20, help="timed repetitions of a row")
    made.add_argument("--peer", type=Path, metavar="FOLDER", help="a checkout of the official ELMO repository")
    return made


if __name__ == "__main__":
    sys.exit(main())
