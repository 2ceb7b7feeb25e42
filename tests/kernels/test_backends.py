"""The same model comes out of every backend, and every machine finds one that works."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import elmo_kernels as ek
import pytest
import torch
from safetensors.torch import load_file, save_file

HERE = Path(__file__).parent
SAME_BYTES = ("data_LD", "exponent_LG", "comp_HD", "flags", "ids_BK")

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is for Linux only")


@pytest.fixture(scope="module")
def cases() -> ModuleType:
    spec = importlib.util.spec_from_file_location("backend_cases", HERE / "backend_cases.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_numba_leaves_the_same_bytes_as_the_twin(cases: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = cases.case_inputs()
    for case in cases.CASES:
        results = []
        for backend in ("reference", "numba"):
            monkeypatch.setenv("ELMO_KERNELS", backend)
            results.append(cases.run_case(case, inputs))
        for name, twin in results[0].items():
            assert twin.equal(results[1][name]), f"{case.name}: {name}"


def test_the_cases_raise_exponents_and_keep_compensation(cases: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ELMO_KERNELS", "reference")
    result = cases.run_case(cases.CASES[-1], cases.case_inputs())
    fresh = ek.make_chunk("fp8", cases.LABELS, cases.DIM, cases.OFFSET, seed=11, std=0.03)
    assert fresh.exponent_LG is not None
    raised = (result["exponent_LG"] > fresh.exponent_LG).float().mean()
    assert 0.1 < raised < 1
    assert (result["comp_HD"] != 0).float().mean() > 0.5 and len(result["comp_HD"]) < cases.LABELS


@needs_triton
def test_triton_kernels_agree_with_the_twin(
    cases: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_python: Callable
) -> None:
    monkeypatch.setenv("ELMO_KERNELS", "reference")
    inputs = cases.case_inputs()
    save_file(inputs, tmp_path / "in.safetensors")
    done = run_python(
        HERE / "interpreted.py", "ops", tmp_path / "in.safetensors", tmp_path / "out.safetensors",
        TRITON_INTERPRET="1", ELMO_KERNELS="triton",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    triton_results = load_file(tmp_path / "out.safetensors")
    for case in cases.CASES:
        for name, twin in cases.run_case(case, inputs).items():
            mine = triton_results[f"{case.name}.{name}"]
            if name in SAME_BYTES and not (case.fmt == "fp32" and name == "data_LD"):
                assert twin.equal(mine), f"{case.name}: {name}"
            else:
                assert torch.allclose(mine, twin, rtol=1e-5, atol=1e-5), f"{case.name}: {name}"


@needs_triton
def test_every_triton_kernel_compiles_for_ampere_and_hopper(run_python: Callable) -> None:
    done = run_python("tools/aot_report.py", "--arch", "sm_80", "sm_90")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if " sm_" in line]
    assert {(row[0], row[-4]) for row in rows} >= {
        (kernel, arch)
        for kernel in ("logit_kernel", "positive_kernel", "input_grad_kernel", "add_partials_kernel", "update_kernel",
                       "raise_exponent_kernel")
        for arch in ("sm_80", "sm_90")
    }  # fmt: skip
    assert all(int(row[-3]) > 0 for row in rows)


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
