"""The doctor tells the truth about a machine, most of all where something is missing or broken."""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from elmo_stream.doctor import driver_version, gpu_advice, matrix_flags, memory_bytes, render, report

ROOT = Path(__file__).resolve().parent.parent
PRINT_REPORT = """
import json
from elmo_stream.doctor import render, report
found = report()
assert render(found)
print(json.dumps(found))
"""


def _ask(*options: str, **variables: str) -> dict:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", **variables}
    command = [sys.executable, *options, "-c", PRINT_REPORT]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_the_report_names_the_libraries_and_threads_that_training_would_use() -> None:
    found = report()
    assert found["packages"]["torch"] == torch.__version__
    assert found["packages"]["zarr"] == version("zarr")
    assert found["threads"]["torch"] == torch.get_num_threads()
    assert len(found["gpus"]) == (torch.cuda.device_count() if torch.cuda.is_available() else 0)
    assert json.loads(json.dumps(found)) == found


def test_the_text_shows_every_installed_version_and_everything_that_is_missing() -> None:
    found = report()
    text = " ".join(render(found).split())
    assert all(f"{name} {number}" in text for name, number in found["packages"].items() if number)
    assert all(" ".join(sentence.split()) in text for sentence in found["missing"])


def test_a_python_without_any_package_gets_sentences_and_no_traceback() -> None:
    found = _ask("-S")  # without site-packages nothing is installed
    assert set(found["packages"].values()) == {None}
    for name in found["packages"]:
        assert any(
            line.startswith(f"{name} is not installed") and line.endswith(f"pip install {name}")
            for line in found["missing"]
        )
    assert found["backends"] == {"cpu": None, "cuda": None}


def test_a_package_that_cannot_be_loaded_is_told_with_its_cause(tmp_path: Path) -> None:
    (tmp_path / "numba.py").write_text("raise ImportError('libllvm is gone')\n")
    found = _ask(PYTHONPATH=os.pathsep.join([str(tmp_path), str(ROOT), str(ROOT / "kernels")]))
    assert any("numba" in line and "libllvm is gone" in line for line in found["missing"])
    assert found["threads"]["numba"] is None


def test_the_kernel_backend_that_a_variable_forces_is_the_one_reported() -> None:
    assert _ask(ELMO_KERNELS="reference")["backends"]["cpu"] == "reference"


def test_a_kernel_backend_that_does_not_exist_is_missing_and_no_traceback() -> None:
    found = _ask(ELMO_KERNELS="warp")
    assert found["backends"]["cpu"] is None
    assert any("warp" in line for line in found["missing"])


@pytest.mark.parametrize(
    ("driver", "cuda", "usable", "advice"),
    [
        ("580.65.06", "13.0", True, None),
        (None, None, False, "driver"),
        ("580.65.06", None, False, "make gpu"),
        ("470.10", "13.0", False, "update the driver"),
    ],
)
def test_an_unused_gpu_is_explained_by_what_stands_in_the_way(
    driver: str | None, cuda: str | None, usable: bool, advice: str | None
) -> None:
    sentences = gpu_advice(driver, "2.13.0", cuda, usable)
    assert len(sentences) == (advice is not None)
    assert all(str(advice) in sentence for sentence in sentences)


def test_what_linux_tells_in_files_is_read(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  Release\nGCC version: 12.2\n")
    assert driver_version(path) == "580.65.06"
    path.write_text("model name\t: x\n" + 2 * "flags\t\t: fpu avx2 avx512f amx_tile\n")
    assert matrix_flags(path) == ["amx_tile", "avx512f"]
    path.write_text("MemTotal:       24000000 kB\nMemFree:  1 kB\nMemAvailable:   12000000 kB\n")
    assert memory_bytes(path) == {"total": 24_576_000_000, "available": 12_288_000_000}


def test_other_systems_without_these_files_are_no_error(tmp_path: Path) -> None:
    absent = tmp_path / "absent"
    assert driver_version(absent) is None
    assert matrix_flags(absent) == []
    assert memory_bytes(absent) == {"total": None, "available": None}
