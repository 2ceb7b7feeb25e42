"""The same model comes out of every backend, and every machine finds one that works."""

import importlib.util
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import elmo_kernels as ek
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

HERE = Path(__file__).parent
SAME_BYTES = ("code_BD", "exponent_B", "data_LD", "exponent_LG", "comp_HD", "flags", "ids_BK")
POSITIVES = ("label_P", "instance_P", "weight_P", "block_ptr")

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is for Linux only")


@pytest.fixture(scope="module")
def cases() -> ModuleType:
    spec = importlib.util.spec_from_file_location("backend_cases", HERE / "backend_cases.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _interpret(mode: str, tmp_path: Path, run_python: Callable, **inputs: int) -> dict[str, Tensor]:
    save_file({name: torch.tensor(value) for name, value in inputs.items()}, tmp_path / "in.safetensors")
    done = run_python(
        HERE / "interpreted.py", mode, tmp_path / "in.safetensors", tmp_path / "out.safetensors",
        TRITON_INTERPRET="1", ELMO_KERNELS="triton",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return load_file(tmp_path / "out.safetensors")


def _assert_same(mine: dict[str, Tensor], twin: dict[str, Tensor], case: Any) -> None:
    for name, tensor in twin.items():
        if name in SAME_BYTES:
            assert _same_bytes(mine[name], tensor), f"{case.name}: {name}"
        else:
            assert torch.allclose(mine[name], tensor, rtol=1e-5, atol=2e-5, equal_nan=True), f"{case.name}: {name}"


def _same_bytes(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def test_numba_leaves_the_same_bytes_as_the_twin(cases: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    for case in cases.CASES:
        results = []
        for backend in ("reference", "numba"):
            monkeypatch.setenv("ELMO_KERNELS", backend)
            results.append(cases.run_case(case))
        for name, twin in results[0].items():
            assert twin.isnan().equal(results[1][name].isnan()), f"{case.name}: {name}"
            assert twin.nan_to_num().equal(results[1][name].nan_to_num()), f"{case.name}: {name}"


def test_the_cases_change_exponents_and_keep_compensation(cases: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ELMO_KERNELS", "reference")
    case = next(case for case in cases.CASES if case.fmt == "fp8" and case.kahan_rows)
    result, fresh = cases.run_case(case), cases.case_weights(case)
    changed = (result["exponent_LG"] != fresh.exponent_LG).float().mean()
    assert 0.1 < changed <= 1
    assert (result["comp_HD"] != 0).float().mean() > 0.5 and len(result["comp_HD"]) < case.shape[0]


def test_a_learning_rate_of_zero_keeps_every_bit_whatever_the_gradients(
    cases: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ELMO_KERNELS", "reference")
    still = [case for case in cases.CASES if not case.rate]
    assert {case.fmt for case in still} == {"bf16", "fp8"}
    for case in still:
        result, fresh = cases.run_case(case), cases.case_weights(case)
        assert not result["flags"].any() and not result["dx_BD"].isfinite().all()
        assert _same_bytes(result["data_LD"], fresh.data_LD) and _same_bytes(result["comp_HD"], fresh.comp_HD)
        assert fresh.exponent_LG is None or _same_bytes(result["exponent_LG"], fresh.exponent_LG)


@needs_triton
@pytest.mark.parametrize("large", [0, pytest.param(1, marks=pytest.mark.slow)], ids=["small", "large"])
def test_triton_kernels_agree_with_the_twin(
    large: int, cases: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_python: Callable
) -> None:
    monkeypatch.setenv("ELMO_KERNELS", "reference")
    results = _interpret("ops", tmp_path, run_python, large=large)
    for case in cases.LARGE_CASES if large else cases.CASES:
        twin = cases.run_case(case)
        mine = {name: results[f"{case.name}.{name}"] for name in twin}
        _assert_same(mine, twin, case)
        if not case.exceptional:
            _assert_close_to_fp64(mine, twin, cases, case)


def _assert_close_to_fp64(mine: dict[str, Tensor], twin: dict[str, Tensor], cases: ModuleType, case: Any) -> None:
    inputs, w_LD = cases.case_inputs(case), ek.dequantize(cases.case_weights(case)).double()
    z_LB = w_LD @ inputs["x_BD"].double().T
    dx_BD = 1 + inputs["step_g_LB"].double().T @ w_LD
    slope_LB = (z_LB + cases.PRIOR).sigmoid() if case.loss == "bce" else 2 * (1 + z_LB + cases.PRIOR).clamp(min=0)
    negative = torch.ones_like(z_LB, dtype=torch.bool)
    row_P = inputs["label_P"] - cases.OFFSET
    inside = (row_P >= 0) & (row_P < len(z_LB))
    negative[row_P[inside], inputs["instance_P"][inside]] = False
    assert 0 < (~negative).sum() < len(row_P)
    for name, gold in (("g_LB", slope_LB), ("dx_BD", dx_BD), ("scores_BK", z_LB.T[:3].topk(7).values)):
        where = negative if name == "g_LB" else torch.ones_like(gold, dtype=torch.bool)
        error, allowed = ((result[name] - gold)[where].abs().max() for result in (mine, twin))
        # Two good summations, and two exponentials, differ by the last two bits of the largest: the interpreter's
        # products are those of a BLAS, which sums in another order on each kind of CPU.
        assert error <= 1.05 * allowed + 2.0**-22 * gold.abs().max(), f"{case.name}: {name}"


@needs_triton
@pytest.mark.parametrize("labels", [640, pytest.param(5632, marks=pytest.mark.slow)], ids=["1M", "10M"])
def test_random_weights_and_updates_become_the_same_bytes_everywhere(
    labels: int, cases: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_python: Callable
) -> None:
    monkeypatch.setenv("ELMO_KERNELS", "reference")
    twin = cases.run_pairs(labels)
    assert (twin["fp8-stochastic-0.0.flags"] > 100).all()
    assert len(twin["fp8-stochastic-0.0.exponent_LG"].unique()) > 90
    monkeypatch.setenv("ELMO_KERNELS", "numba")
    for mine in (cases.run_pairs(labels), _interpret("pairs", tmp_path, run_python, labels=labels)):
        for name, tensor in twin.items():
            nan = tensor.isnan() if name == "fp32-nearest-0.0.data_LD" else torch.zeros((), dtype=torch.bool)
            assert _same_bytes(mine[name].masked_fill(nan, 0), tensor.masked_fill(nan, 0)), name


@pytest.mark.gpu
def test_a_gpu_agrees_with_the_twin_to_the_byte(cases: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu, pairs = {case: cases.run_case(case, "cuda") for case in cases.CASES}, cases.run_pairs(5632, "cuda")
    monkeypatch.setenv("ELMO_KERNELS", "reference")
    for case, mine in on_gpu.items():
        twin = cases.run_case(case)
        for name in SAME_BYTES:
            assert name not in twin or name == "ids_BK" or _same_bytes(mine[name], twin[name]), f"{case.name}: {name}"
    for name, tensor in cases.run_pairs(5632).items():
        nan = tensor.isnan() if name == "fp32-nearest-0.0.data_LD" else torch.zeros((), dtype=torch.bool)
        assert _same_bytes(pairs[name].masked_fill(nan, 0), tensor.masked_fill(nan, 0)), name


@needs_triton
def test_a_block_gets_the_same_kernel_in_a_chunk_of_any_size() -> None:
    from elmo_kernels.triton_ops import block_runs

    kinds = []
    for size in (1024, 3072, 5000):
        kind = {}
        for start in range(0, 5000, size):
            for first, last in block_runs(start, min(start + size, 5000), head=1500):
                kind.update(dict.fromkeys(range(first, last), (first < 1500, (last - first) % 1024 == 0)))
        kinds.append(kind)
    assert list(kinds[0]) == list(range(5000)) and len(set(kinds[0].values())) == 3
    assert kinds[0] == kinds[1] == kinds[2]


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [64, 128, 130])
def test_the_chunk_size_leaves_no_trace_on_a_gpu(batch: int, make_batch: Callable) -> None:
    results = []
    for size in (1024, 3072, 5000):
        inputs = make_batch(5000, batch, 256)
        x_BD = ek.operand(inputs.x_BD.cuda(), "fp8")
        positives = SimpleNamespace(**{name: getattr(inputs, name).cuda() for name in POSITIVES})
        dx_BD, flags = torch.zeros(batch, 256, device="cuda"), torch.zeros(2, dtype=torch.int64, device="cuda")
        scores_BK, ids_BK = torch.full((batch, 9), -torch.inf).cuda(), torch.full((batch, 9), -1).cuda()
        data = []
        for first in range(0, 5000, size):
            count = min(size, 5000 - first)
            rows = max(0, min(1500 - first, count))
            w = ek.make_chunk("fp8", count, 256, first, seed=1, std=0.1, kahan_rows=rows, device="cuda")
            ek.topk_merge_(scores_BK, ids_BK, w, x_BD)
            g_LB, _ = ek.logit_grad(w, x_BD, positives, loss="bce")
            step = {"lr": 0.1, "weight_decay": 0.0, "rounding": "stochastic", "seed": 1, "step": 1}
            ek.update_(w, g_LB, x_BD, dx_BD, flags=flags, **step)  # type: ignore[arg-type]
            data.append(w.data_LD)
        results.append((torch.cat(data), dx_BD, scores_BK, ids_BK))
    for other in results[1:]:
        assert all(a.equal(b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.gpu
def test_a_step_never_waits_for_the_gpu(cases: ModuleType) -> None:
    case = cases.CASES[-1]
    inputs = {name: tensor.cuda() for name, tensor in cases.case_inputs(case).items()}
    w, x_BD = cases.case_weights(case, "cuda"), ek.operand(inputs["x_BD"], "fp8")
    dx_BD, flags = torch.zeros(x_BD.shape, device="cuda"), torch.zeros(2, dtype=torch.int64, device="cuda")
    scores_BK, ids_BK = torch.full((len(x_BD), 9), -torch.inf).cuda(), torch.full((len(x_BD), 9), -1).cuda()
    for mode in ("default", "error"):
        torch.cuda.set_sync_debug_mode(mode)
        try:
            scalars = ek.step_scalars("cuda", lr=0.1, weight_decay=0.0, seed=1, step=1)
            g_LB, _ = ek.logit_grad(w, x_BD, SimpleNamespace(**inputs), loss="bce", want_loss=True)
            ek.update_with_(w, g_LB, x_BD, dx_BD, scalars=scalars, rounding="stochastic", flags=flags)
            ek.topk_merge_(scores_BK, ids_BK, w, x_BD)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert dx_BD.abs().sum() > 0


def test_no_line_of_the_triton_backend_reads_a_tensor_back() -> None:
    files = [*(HERE.parents[1] / "kernels" / "elmo_kernels").glob("*triton*.py")]
    assert len(files) >= 5
    for file in files:
        assert not re.search(r"\.(item|tolist|cpu|numpy)\(|\.nonzero\(|synchronize", file.read_text()), file.name


@needs_triton
def test_every_triton_kernel_compiles_for_ampere_and_hopper_without_spills(run_python: Callable) -> None:
    done = run_python("tools/aot_report.py", "--brief", "--arch", "sm_80", "sm_90", "--batch", "16")
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    rows = {(row[0], fmt, arch) for fmt in ek.FORMATS for arch in ("sm_80", "sm_90")
            for row in map(str.split, done.stdout.splitlines()) if {fmt, arch} <= set(row)}  # fmt: skip
    for kernel in ("slope", "candidate", "positive", "update", "input_grad"):
        assert {(kernel, fmt, arch) for fmt in ek.FORMATS for arch in ("sm_80", "sm_90")} <= rows
    assert {kernel for kernel, *_ in rows} >= {"add_partials", "merge"}


def test_importing_the_package_loads_no_compiler(run_python: Callable) -> None:
    code = "import sys, elmo_kernels; print([name for name in ('numba', 'triton') if name in sys.modules])"
    assert run_python("-c", code).stdout.strip() == "[]"


def test_an_unknown_backend_is_refused_with_the_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ELMO_KERNELS", "cuda")
    with pytest.raises(ValueError, match="choose one of reference, numba, triton"):
        ek.backend_name("cpu")


@pytest.mark.parametrize(("forced", "device"), [("triton", "cpu"), ("numba", "cuda")])
def test_a_backend_that_cannot_work_on_the_device_is_refused(
    forced: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ELMO_KERNELS", forced)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=f"{forced} cannot work on {device}"):
        ek.backend_name(device)


def test_each_device_gets_its_fastest_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ELMO_KERNELS", raising=False)
    assert ek.backend_name("cuda") == "triton"
    assert ek.backend_name("cpu") == "numba"
