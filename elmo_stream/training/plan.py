"""The plan of a run: where every byte goes and how long a step takes, before anything large is allocated."""

from dataclasses import asdict, dataclass
from typing import Any

from elmo_stream.model.placement import DEVICE, MAPPED, PINNED, ChunkPlan
from elmo_stream.training.rates import Rates

HOST, DISK, RUN = "host", "disk", "run folder"
ALWAYS = "always"
EVALUATION_BATCH = 256
"""Instances that are ranked at a time, in evaluation and prediction."""


@dataclass(frozen=True)
class Row:
    """A part of the memory: at ``device``, ``host``, ``disk`` or in the run folder, all the time or in one phase.

    ``keys`` are the configuration keys that change it.
    """

    name: str
    where: str
    phase: str
    bytes: int
    keys: str = ""


@dataclass(frozen=True)
class StepTime:
    """Predicted seconds of a step; ``hidden_from_batch`` is the batch from which transfers hide behind computation."""

    encoder: float
    compute: float
    transfer: float
    hidden_from_batch: int | None

    @property
    def step(self) -> float:
        """Seconds of a whole step."""
        return self.encoder + max(self.compute, self.transfer)


@dataclass(frozen=True)
class Plan:
    """Sizes and places of a run.

    Attributes:
        budget: bytes that may be used at ``device``, ``host`` and ``disk``, as far as they are limited.
    """

    chunks: ChunkPlan
    labels: int
    dim: int
    batch: int
    instances: int
    steps_per_epoch: int
    steps: int
    rows: tuple[Row, ...]
    budget: dict[str, int]
    rates: Rates | None = None

    def peak(self, where: str) -> int:
        """The most bytes in use at a place: what is always there and the largest phase."""
        phases: dict[str, int] = {}
        for row in self.rows:
            if row.where == where:
                phases[row.phase] = phases.get(row.phase, 0) + row.bytes
        always = phases.pop(ALWAYS, 0)
        return always + max(phases.values(), default=0)

    @property
    def places(self) -> tuple[str, ...]:
        """Where the run has bytes."""
        return tuple(dict.fromkeys(row.where for row in self.rows if row.bytes))

    def lacks(self) -> dict[str, int]:
        """Bytes beyond the budget by place; empty for a plan that can work."""
        beyond = {where: self.peak(where) - limit for where, limit in self.budget.items()}
        return {where: size for where, size in beyond.items() if size > 0}

    def advice(self) -> list[str]:
        """What to change, one sentence for each place that lacks room."""
        lines = []
        for where, size in self.lacks().items():
            rows = sorted((row for row in self.rows if row.where == where and row.keys), key=lambda row: -row.bytes)
            keys = ", ".join(dict.fromkeys(key for row in rows[:4] for key in row.keys.split(", ")))
            budget = f"memory.{where}" if where != DISK else "memory.disk"
            lines.append(
                f"{where}: {_mib(size)} more than the {_mib(self.budget[where])} of {budget}; "
                f"raise it, or change {keys}."
            )
        return lines

    def time(self) -> StepTime | None:
        """Predicted seconds of a step, from the rates; None without."""
        rates = self.rates
        if rates is None:
            return None
        weights = self.labels * self.dim
        fixed = weights / rates.weights if rates.weights else 0.0
        each = 6 * weights / rates.flops if rates.flops else 0.0
        mapped, streamed = self.chunks.bytes_at(MAPPED), self.chunks.bytes_at(PINNED) + self.chunks.bytes_at(MAPPED)
        moving = mapped / rates.disk_work if rates.disk_work else 0.0
        transfer = max(
            size / rate if rate else 0.0
            for size, rate in (
                (mapped, rates.disk_read),
                (mapped, rates.disk_write),
                (streamed, rates.to_device),
                (streamed, rates.from_device),
            )
        )
        encoder = (rates.encoder_fixed or 0.0) + (
            self.batch / rates.encoder_instances if rates.encoder_instances else 0.0
        )
        hidden = max(1, -int(-(transfer - fixed - moving) // each)) if transfer and each else None
        return StepTime(encoder, fixed + each * self.batch + moving, transfer, hidden)

    def as_dict(self) -> dict[str, Any]:
        """The plan as plain values; bytes in ``memory``, seconds in ``time``."""
        time = self.time()
        return {
            "labels": self.labels,
            "dim": self.dim,
            "batch": self.batch,
            "chunks": len(self.chunks.layouts),
            "chunk_labels": self.chunks.largest_labels,
            "placement": {place: len(self.chunks.at(place)) for place in (DEVICE, PINNED, MAPPED)},
            "instances": self.instances,
            "steps_per_epoch": self.steps_per_epoch,
            "steps": self.steps,
            "memory": [asdict(row) for row in self.rows],
            "peak": {where: self.peak(where) for where in self.places},
            "budget": self.budget,
            "fits": not self.lacks(),
            "advice": self.advice(),
            "rates": self.rates.as_dict() if self.rates else None,
            "time": {**asdict(time), "step": time.step, "epoch": time.step * self.steps_per_epoch} if time else None,
        }

    def places_text(self) -> str:
        """How many chunks are where."""
        return ", ".join(f"{len(self.chunks.at(p)):,} {p}" for p in (DEVICE, PINNED, MAPPED) if self.chunks.at(p))

    def table(self) -> str:
        """The plan as lines for a person."""
        lines = [
            f"{self.instances:,} instances, {self.labels:,} labels x {self.dim} features in "
            f"{len(self.chunks.layouts):,} chunks ({self.places_text()}), batch {self.batch:,}: {self.steps:,} steps "
            f"({self.steps_per_epoch:,} an epoch)"
        ]
        for place in self.places:
            lines += ["", f"{place:<52}{'':>15}  when        keys that change it"]
            lines += [
                f"  {row.name:<50}{_mib(row.bytes):>15}  {row.phase:<10}  {row.keys}".rstrip()
                for row in self.rows
                if row.where == place and row.bytes
            ]
            limit = f"  of {_mib(self.budget[place])}" if place in self.budget else ""
            lines.append(f"  {'at the peak: always + the largest phase':<50}{_mib(self.peak(place)):>15}{limit}")
        return "\n".join([*lines, *self._time_lines(), *self.advice()])

    def _time_lines(self) -> list[str]:
        time = self.time()
        if time is None:
            return []
        lines = [
            "",
            f"a step: {_seconds(time.step)} (encoder {_seconds(time.encoder)}; classifier: computing "
            f"{_seconds(time.compute)}, transfers {_seconds(time.transfer)}); an epoch: "
            f"{_seconds(time.step * self.steps_per_epoch)}, without validation and checkpoints",
        ]
        if self.rates and self.rates.encoder_instances is None:
            lines.append("the encoder's time is unknown: it is too large to try")
        if time.hidden_from_batch:
            lines.append(f"transfers hide behind computing from batch {time.hidden_from_batch:,} on")
        return lines


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"


def _seconds(seconds: float) -> str:
    if seconds < 1:
        return f"{1000 * seconds:,.1f} ms"
    return f"{seconds:,.1f} s" if seconds < 3600 else f"{seconds / 3600:,.1f} h"
