"""What a run tells: ``metrics.jsonl``, TensorBoard, one line of progress, and the environment it ran in."""

import json
import platform
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from elmo_stream.files import naming, reading, write_bytes_durably
from elmo_stream.system import peak_resident_bytes
from elmo_stream.training.board import Board

LOG_STEPS = 50
LINE_SECONDS = 5.0
_DECIDING = ("elmo-stream", "numpy", "numba", "triton", "transformers", "torch-optimi", "torchao")

Report = Callable[[str], None]


def environment() -> dict[str, Any]:
    """What decides whether a resumed run gives the same bits."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        **{name: _version(name) for name in _DECIDING},
        "machine": platform.machine(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:  # a checkout that is not installed, or a system without Triton
        return None


def peak_memory_bytes(device: torch.device) -> int:
    """Peak of the allocator on a GPU, of the process's resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_resident_bytes()


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss."""
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class RunLog:
    """Writes the metrics of a run; lines of steps after ``step`` are taken back, since they will be trained again."""

    def __init__(self, run: Path, step: int, total_steps: int, report: Report, device: torch.device) -> None:
        self._path = run / "metrics.jsonl"
        self._keep_until(step)
        self._stream = open(self._path, "ab")  # noqa: SIM115  closed by __exit__
        self._report, self._device = report, device
        self._total, self._begin_step, self._begin = total_steps, step, time.monotonic()
        self._last_line = 0.0
        self._instances = 0
        self._board = Board(run / "tensorboard", step + 1)

    def _keep_until(self, step: int) -> None:
        if not self._path.exists():
            return
        kept = []
        with reading(self._path) as stream:
            lines = stream.read().splitlines(keepends=True)
        for line in lines:
            if not line.endswith(b"\n"):
                break  # cut by a kill
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except (ValueError, KeyError, TypeError):
                break  # torn by a power cut; what follows is trained again
        write_bytes_durably(self._path, b"".join(kept))

    def count(self, instances: int) -> None:
        """Count trained instances for the rate."""
        self._instances += instances

    def training(self, step: int, epoch: float, loss: float | None, rates: dict[str, float]) -> None:
        """Record the loss per instance (None where the step was left out) and the rates after ``step`` steps."""
        elapsed = time.monotonic() - self._begin
        speed = self._instances / max(elapsed, 1e-9)
        values = {"epoch": round(epoch, 4), **({} if loss is None else {"loss": loss}), **rates}
        self._write(step, values, {"instances_per_second": float(f"{speed:.4g}")})
        if time.monotonic() - self._last_line >= LINE_SECONDS or step == self._total:
            self._last_line = time.monotonic()
            left = elapsed / max(1, step - self._begin_step) * (self._total - step)
            self._report(
                f"step {step:,}/{self._total:,}  epoch {epoch:.2f}  loss {'-' if loss is None else f'{loss:.3f}'}  "
                f"{speed:,.0f} instances/s  peak {peak_memory_bytes(self._device) / 2**20:,.0f} MiB  "
                f"ETA {clock(left)}"
            )

    def validation(self, step: int, metrics: dict[str, float]) -> None:
        """Record the metrics of the validation split."""
        self._write(step, {f"validation/{name}": value for name, value in metrics.items()}, {})
        shown = "  ".join(f"{name} {100 * metrics[name]:.2f}" for name in ("P@1", "P@3", "P@5") if name in metrics)
        self._report(f"step {step:,}/{self._total:,}  validation  {shown}")

    def _write(self, step: int, values: dict[str, float], timing: dict[str, float]) -> None:
        with naming(self._path):
            self._stream.write((json.dumps({"step": step, **values, **timing}) + "\n").encode())
            self._stream.flush()
        self._board.add(step, {**values, **timing})

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with naming(self._path):
            self._stream.close()
        self._board.close()
