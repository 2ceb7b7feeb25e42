"""Batches, backends and the Triton interpreter for the tests of the kernels."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]


@dataclass(frozen=True)
class Batch:
    """Embeddings and sorted positives, as ``elmo_kernels.Positives`` describes them."""

    x_BD: Tensor
    label_P: Tensor
    instance_P: Tensor
    weight_P: Tensor
    block_ptr: Tensor

    def targets(self, labels: int) -> Tensor:
        """The dense float64 targets, (labels, B)."""
        y_LB = torch.zeros(labels, len(self.x_BD), dtype=torch.float64)
        y_LB[self.label_P, self.instance_P] = self.weight_P.double()
        return y_LB


def _batch(labels: int, batch: int, dim: int, *, soft: bool = False, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    count = min(labels * batch, 3 * batch)
    pair_P = torch.randperm(labels * batch, generator=generator)[:count].sort().values
    label_P = pair_P // batch
    weight_P = torch.rand(count, generator=generator).clamp(min=0.1) if soft else torch.ones(count)
    starts = torch.arange(-(-labels // 1024) + 1) * 1024
    x_BD = torch.randn(batch, dim, generator=generator)
    return Batch(x_BD, label_P, pair_P % batch, weight_P, torch.searchsorted(label_P, starts))


@pytest.fixture
def make_batch() -> Callable[..., Batch]:
    """``make_batch(labels, batch, dim, soft=False, seed=0)``: about three positives an instance."""
    return _batch


@pytest.fixture(params=["reference", "numba"])
def cpu_backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run the test on each backend of the CPU."""
    monkeypatch.setenv("ELMO_KERNELS", request.param)
    return str(request.param)


def _run_python(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("TRITON_INTER", "ELMO_"))}
    path = os.pathsep.join([str(REPOSITORY / "kernels"), str(HERE)])
    command = [sys.executable, *map(str, arguments)]
    env = {**clean, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=600, cwd=REPOSITORY)


@pytest.fixture
def run_python() -> Callable[..., subprocess.CompletedProcess[str]]:
    """``run_python("file.py", "argument", NAME="value")``: a fresh process that can import our kernels."""
    return _run_python
