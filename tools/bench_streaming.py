"""Steps of a classifier that is larger than the device's memory, beside the bounds of transfer and compute.

    python -m tools.bench_streaming --json streaming.json

The memory of the device is capped, to stand for a smaller card; chunks that do not fit are streamed from pinned host
memory. The bound is the longer of the step's products and of the transfers of the streamed chunks, in and out at once,
at the rates that ``tools.roofline`` measures first. ``MiB`` is the peak of the allocator, weights included. On a CPU
the overflow goes to files in a temporary folder, and there is no cap and no bound of transfers.
"""

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from elmo_stream.config import ClassifierConfig
from elmo_stream.model.classifier import ChunkedClassifier
from elmo_stream.model.placement import DEVICE, plan_chunks
from tools import roofline
from tools.batches import DECAY, LR, PRIOR_SHARE, SEED, Shape, make_batch
from tools.measuring import MIB, attempt, finish, median_ms, parser, write_json
from tools.roofline import Roofline
from tools.tables import Row

COLUMNS = ("labels", "dim", "batch", "cap GiB", "streamed GiB", "ms", "bound", "time / bound", "instances/s", "MiB")
GIB = 2**30
WORKSPACE = 2**30
"""Bytes under the cap that are left to a step: gradients of the logits and partial sums of a chunk, compiled code."""


@dataclass(frozen=True)
class Case:
    """A classifier under a cap of so many bytes."""

    shape: Shape
    cap: int
    workspace: int = WORKSPACE


CASES = (Case(Shape(8_623_847, 768, 2048), 8 * GIB), Case(Shape(100_000_000, 768, 4096), 16 * GIB))
TINY_CASES = (Case(Shape(5000, 64, 8), 200_000, workspace=0),)


def measure(case: Case, rates: Roofline, device: torch.device, repeats: int) -> Row:
    """Time, bound and peak of a case."""
    shape, gpu = case.shape, device.type == "cuda"
    config = ClassifierConfig(format="fp8", weight_decay=DECAY, chunk_labels=1024 if case.workspace == 0 else 0)
    room, host_room = case.cap - case.workspace, sys.maxsize if gpu else None
    plan = plan_chunks(shape.labels, shape.dim, config, device=device, device_room=room, host_room=host_room)
    streamed = sum(layout.bytes for layout, place in zip(plan.layouts, plan.places, strict=True) if place != DEVICE)
    if gpu:
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, case.cap / total), device.index)
        torch.cuda.reset_peak_memory_stats(device)
    with tempfile.TemporaryDirectory() as folder:
        classifier = ChunkedClassifier(
            shape.labels,
            shape.dim,
            config,
            prior=PRIOR_SHARE,
            seed=SEED,
            device=device,
            plan=plan,
            scratch=Path(folder),
        )
        batch = make_batch(shape, device)
        step = partial(classifier.train_step, batch.x_BD, batch, lr=LR, step=1)
        try:
            ms = median_ms(step, device, repeats=repeats)
        finally:
            classifier.close()
    weights = shape.labels * shape.dim
    compute = rates.bound_ms(data=2 * weights, operations=6 * weights * shape.batch, fmt="fp8")
    transfer = 1e3 * 2 * streamed / rates.both_ways if gpu else 0.0
    bound = max(compute, transfer)
    return {
        "streamed GiB": streamed / GIB,
        "ms": ms,
        "bound": bound,
        "time / bound": ms / bound,
        "instances/s": 1e3 * shape.batch / ms,
        "MiB": torch.cuda.max_memory_allocated(device) / MIB if gpu else None,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; 1 when a row failed."""
    made = parser(__doc__, tiny="one tiny classifier: tries the code")
    made.add_argument("--repeats", type=int, default=5, help="timed steps of a row")
    options = made.parse_args(arguments)
    rates = roofline.measure(options.device, tiny=options.tiny)
    rows: list[Row] = []
    for case in TINY_CASES if options.tiny else CASES:
        shape = case.shape
        row = {"labels": shape.labels, "dim": shape.dim, "batch": shape.batch, "cap GiB": case.cap / GIB}
        rows.append(attempt(row, partial(measure, case, rates, options.device, options.repeats)))
        write_json(options, rows, columns=COLUMNS, roofline=rates.as_dict())
    return finish(options, rows, COLUMNS, roofline=rates.as_dict())


if __name__ == "__main__":
    sys.exit(main())
