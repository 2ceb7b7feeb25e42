"""A classifier step on the CPU beside the step a user would write in FP32 torch: time and peak memory.

    python -m tools.bench_step --json step.json

Contenders: our step in each format, with chunks as the classifier chooses them, and plain torch: ``x @ W.T``, summed
binary cross-entropy with logits on dense targets, autograd, and SGD in place. All give the gradient of the embeddings
too. Each contender is a process of its own; they take turns, one step each a round, so that a slow moment of the
machine meets all of them, and ratios are medians over rounds. Peak memory is the process's high-water mark minus that
of a process that does the same with 1,024 labels: libraries and compiled code do not count.
"""

import argparse
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence

import elmo_kernels as ek
import torch
import torch.nn.functional as F
from torch import Tensor

from elmo_stream.config import ClassifierConfig
from elmo_stream.model.classifier import ChunkedClassifier
from elmo_stream.system import peak_resident_bytes
from tools.batches import LR, SEED, STD, Shape, make_batch
from tools.measuring import MIB, clocked_ms, finish, parser
from tools.tables import Row

CPU = torch.device("cpu")
TORCH = "torch"
CONTENDERS = ("fp8", "bf16", "fp32", TORCH)
TINY_CONTENDERS, TINY_SHAPE = ("bf16", TORCH), Shape(2048, 64, 8)
COLUMNS = ("step", "ms", "MiB", "time / torch", "memory / torch", "time / bf16", "goal")
GOALS = {"fp8": "time / torch <= 0.6 (aim 0.4), memory / torch <= 0.25, time / bf16 <= 1.15"}
SMALL_LABELS = 1024
NO_PRIOR = 0.5
"""A share of positives whose logit is 0: plain torch has no prior either."""
WARM_UPS = 2


def make_step(name: str, shape: Shape) -> Callable[[], Tensor]:
    """A contender's step as a function of no argument, which returns the gradient of the embeddings."""
    batch = make_batch(shape, CPU)
    if name != TORCH:
        config = ClassifierConfig(format=name, weight_decay=0.0, init_std=STD)
        ours = ChunkedClassifier(shape.labels, shape.dim, config, prior=NO_PRIOR, seed=SEED, device=CPU)
        return lambda: ours.train_step(batch.x_BD, batch, lr=LR, step=1)[0]
    w_LD = ek.make_chunk("fp32", shape.labels, shape.dim, 0, seed=SEED, std=STD).data_LD.requires_grad_()

    def plain() -> Tensor:
        x_BD = batch.x_BD.clone().requires_grad_()
        y_BL = torch.zeros(shape.batch, shape.labels)
        y_BL[batch.instance_P, batch.label_P] = 1.0
        F.binary_cross_entropy_with_logits(x_BD @ w_LD.T, y_BL, reduction="sum").backward()
        assert w_LD.grad is not None
        with torch.no_grad():
            w_LD.sub_(w_LD.grad, alpha=LR)
        w_LD.grad = None
        assert x_BD.grad is not None
        return x_BD.grad

    return plain


def serve(name: str, shape: Shape) -> None:
    """A contender's process: a step for each line on the standard input, its milliseconds on the output.

    At the end of the input comes the high-water mark of its memory in bytes.
    """
    step = make_step(name, shape)
    for _ in sys.stdin:
        print(clocked_ms(step), flush=True)
    print(peak_resident_bytes())


class Contender:
    """The parent's end of a contender's process."""

    def __init__(self, name: str, shape: Shape, threads: int) -> None:
        command = [sys.executable, "-m", "tools.bench_step", "--serve", name, "--shape", str(shape)]
        command += ["--threads", str(threads)]
        pipe = subprocess.PIPE
        # Threads of a process that waits its turn must not spin.
        environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)
        self.times: list[float] = []

    def step(self) -> None:
        """Take one step; only one process works at a time."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write("step\n")
        self._process.stdin.flush()
        self.times.append(float(self._answer()))

    def finish(self) -> int:
        """End the process; its peak memory in bytes."""
        assert self._process.stdin
        self._process.stdin.close()
        peak = int(self._answer())
        self._process.wait()
        return peak

    def _answer(self) -> str:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"a contender's process ended with code {self._process.wait()}; its error is above.")
        return line


def run(names: Sequence[str], shape: Shape, rounds: int, threads: int) -> list[Row]:
    """A row a contender; "bf16" and "torch", with which the others are compared, are among them."""
    small = Shape(min(SMALL_LABELS, shape.labels), shape.dim, shape.batch)
    idle = {}
    for name in names:
        lone = Contender(name, small, threads)
        for _ in range(WARM_UPS):
            lone.step()
        idle[name] = lone.finish()
    racers = {name: Contender(name, shape, threads) for name in names}
    for _ in range(WARM_UPS + rounds):
        for racer in racers.values():
            racer.step()
    times = {name: racer.times[WARM_UPS:] for name, racer in racers.items()}
    memory = {name: racer.finish() - idle[name] for name, racer in racers.items()}

    def ratio(name: str, other: str) -> float:
        return statistics.median(a / b for a, b in zip(times[name], times[other], strict=True))

    return [
        {
            "step": name,
            "ms": statistics.median(times[name]),
            "MiB": memory[name] / MIB,
            "time / torch": ratio(name, TORCH),
            "memory / torch": memory[name] / memory[TORCH],
            "time / bf16": ratio(name, "bf16"),
            "goal": GOALS.get(name),
            "all_ms": times[name],
        }
        for name in names
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print, or serve as a contender."""
    options = _parser().parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.serve:
        serve(options.serve, options.shape)
        return 0
    names, shape = (TINY_CONTENDERS, TINY_SHAPE) if options.tiny else (CONTENDERS, options.shape)
    return finish(options, run(names, shape, options.rounds, options.threads), COLUMNS)


def _parser() -> argparse.ArgumentParser:
    made = parser(__doc__, tiny="2,048 labels, two contenders: tries the code")
    made.set_defaults(device=CPU)
    made.add_argument("--shape", type=Shape.parse, default=Shape(131072, 384, 128), metavar="LABELSxDIMxBATCH")
    made.add_argument("--rounds", type=int, default=11, help="timed steps of each contender")
    made.add_argument("--threads", type=int, default=0, help="of torch and Numba; 0: all cores")
    made.add_argument("--serve", choices=CONTENDERS, help=argparse.SUPPRESS)
    return made


if __name__ == "__main__":
    sys.exit(main())
