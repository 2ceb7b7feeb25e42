"""The benchmarks run unattended on machines that no one watches: each part works, and a failure is told, not hidden."""

import json
import os
import subprocess
import sys
from pathlib import Path

import elmo_kernels as ek
import pytest
import torch
from elmo_kernels import rounding as rd
from elmo_kernels.reference import Step, update_rows_

from tools.batches import Shape
from tools.bench_step import make_step

ROOT = Path(__file__).parents[2]


def _run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT, env=environment)


def _sections(folder: Path) -> dict[str, dict]:
    content = json.loads((folder / "gpu-check.json").read_text())
    return {section["section"]: section for section in content["sections"]}


def test_gpu_check_measures_every_operation_and_says_on_what(tmp_path: Path) -> None:
    done = _run("tools/gpu_check.py", "--out", tmp_path, "--dry-run", "--only", "roofline", "3m", "model", "overflow")
    assert done.returncode == 0, done.stdout + done.stderr
    sections = _sections(tmp_path)
    assert sections["roofline"]["roofline"]["copy"] > 0
    assert all(row["planned MiB"] > 0 and row["ms"] > 0 for row in sections["model"]["rows"])
    assert all(row["streamed GiB"] > 0 and row["ms"] > 0 for row in sections["overflow"]["rows"])
    measured = {(row["op"], row["format"]) for row in sections["3m"]["rows"]}
    formats = ("fp8", "bf16", "fp8+kahan")
    assert measured == {(op, fmt) for op in ("logit_grad", "update", "top-100", "step") for fmt in formats}
    assert sections["3m"]["machine"]["torch"] == torch.__version__
    assert done.stdout.rstrip().splitlines()[-1].startswith("model"), "the verdicts come last"


def test_gpu_check_reports_what_failed_and_keeps_the_rest(tmp_path: Path) -> None:
    done = _run("tools/gpu_check.py", "--out", tmp_path, "--dry-run", "--only", "1.3m", "--peer", tmp_path / "nowhere")
    assert done.returncode == 1
    rows = _sections(tmp_path)["1.3m"]["rows"]
    failed = [row for row in rows if "error" in row]
    assert {row["op"] for row in failed} == {"step of the peer"}
    assert all("nowhere" in row["error"] for row in failed)
    assert all(row["ms"] > 0 for row in rows if row not in failed)
    assert "FAILED" in done.stdout


def test_gpu_check_cuts_off_a_section_that_takes_too_long(tmp_path: Path) -> None:
    done = _run("tools/gpu_check.py", "--out", tmp_path, "--dry-run", "--only", "3m", "--minutes", "0.001")
    assert done.returncode == 1
    assert _sections(tmp_path)["3m"]["verdict"] == "cut off"


def test_bench_step_races_steps_that_do_the_same_work() -> None:
    shape = Shape(1500, 48, 6)
    steps = [make_step(name, shape) for name in ("torch", "fp32", "bf16", "fp8")]
    for _ in range(2):  # the second gradient is that of the weights after the first update
        plain, *ours = [step() for step in steps]
        for dx_BD, tolerance in zip(ours, (1e-5, 0.01, 0.1), strict=True):
            assert (dx_BD - plain).norm() < tolerance * plain.norm()


def test_bench_step_races_processes_and_prints_ratios(tmp_path: Path) -> None:
    done = _run("-m", "tools.bench_step", "--tiny", "--rounds", "1", "--threads", "1", "--json", tmp_path / "step.json")
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "step.json").read_text())["rows"]
    assert [row["step"] for row in rows] == ["bf16", "torch"]
    assert all(row["ms"] > 0 and row["time / torch"] > 0 for row in rows)


def test_bench_formats_rounds_as_the_product_does() -> None:
    formats = pytest.importorskip("tools.bench_formats", reason="bench_formats needs the extra demo")
    labels, dim, seed, lr = 40, 144, 3, 0.5
    weights = formats.Weights(formats.FORMATS["fp8"], labels, dim, seed)
    before_LD = weights.value_LD.clone()
    generator = torch.Generator().manual_seed(1)
    g_LB, x_BD = torch.randn(labels, 7, generator=generator), torch.randn(7, dim, generator=generator)
    weights.step(g_LB, x_BD, lr, 5)
    # A step from zero against minus the new values.
    w, flags = ek.empty_chunk("fp8", labels, dim, 0), torch.zeros(2, dtype=torch.int64)
    new_LD = torch.addmm(before_LD, g_LB, x_BD, alpha=-lr)
    unit = Step(1.0, 1.0, rd.stream_key(seed, 5))
    update_rows_(w, slice(0, labels), torch.zeros_like(new_LD), -new_LD, unit, "stochastic", flags)
    assert torch.equal(weights.value_LD, ek.dequantize(w))


def test_bench_formats_prints_every_format(tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="bench_formats needs the extra demo")
    (tmp_path / "raw").mkdir()
    for split, count in (("trn", 600), ("tst", 90)):
        topics = [[i % 30, (7 * i) % 30] for i in range(count)]
        texts = [" ".join(f"word{topic} again{topic}" for topic in pair) for pair in topics]
        (tmp_path / "raw" / f"{split}_X.txt").write_text("\n".join(texts) + "\n")
        entries = [" ".join(f"{topic}:1.0" for topic in sorted(set(pair))) for pair in topics]
        (tmp_path / f"{split}_X_Y.txt").write_text("\n".join([f"{count} 30", *entries]) + "\n")
    out = tmp_path / "out.json"
    done = _run("-m", "tools.bench_formats", tmp_path, "--tiny", "--dim", "16", "--lr", "0.5", "--json", out)
    assert done.returncode == 0, done.stderr
    rows = {row["format"]: row for row in json.loads(out.read_text())["rows"]}
    assert float(rows["fp32"]["P@1"]) > 50
    assert 0 < rows["bf16"]["distance"] < rows["fp8"]["distance"] < 0.5
