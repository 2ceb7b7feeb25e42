"""``elmo-stream doctor``: what this machine has for training, and what it lacks and how to get it.

Nothing here assumes that a package is installed: the doctor is asked most when something is broken.
"""

import importlib
import importlib.metadata
import platform
import re
import sys
import warnings
from pathlib import Path
from textwrap import fill
from typing import Any

from elmo_stream.system import available_cpus

NEEDED_FOR = {
    "torch": "every tensor",
    "numpy": "every array",
    "numba": "training fast on a CPU",
    "triton": "training on a GPU",
    "zarr": "reading and writing stores",
    "numcodecs": "reading and writing stores",
    "tokenizers": "turning text into tokens",
    "transformers": "transformer encoders",
    "huggingface-hub": "tokenizers and encoders named as on the Hugging Face hub",
    "safetensors": "checkpoints",
    "torch-optimi": "encoders in BF16 with Kahan summation",
    "tensorboard": "curves in TensorBoard",
    "click": "the command line",
    "scikit-learn": "the baselines of the demo",
    "zstandard": "reading input files",
    "pyarrow": "Parquet files",
}
LINE = 100
NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")
CPU_INFO = Path("/proc/cpuinfo")
MEMORY_INFO = Path("/proc/meminfo")


def report() -> dict[str, Any]:
    """The state of this machine as plain JSON values.

    Keys: ``elmo_stream``, ``python``, ``platform``, ``packages`` (name -> version), ``cpu`` (``isa``,
    ``flags``, ``count``), ``memory`` (bytes), ``threads``, ``gpus`` (memory in bytes), ``driver``,
    ``backends`` (device -> kernel backend), ``missing`` (sentences). None is what cannot be found out.
    """
    missing: list[str] = []
    versions = {name: _version(name) for name in NEEDED_FOR if name != "triton" or sys.platform == "linux"}
    missing += [
        f"{name} is not installed; it is needed for {NEEDED_FOR[name]}: pip install {name}"
        for name, version in versions.items()
        if version is None
    ]
    torch, numba = (_load(name, versions[name], missing) for name in ("torch", "numba"))
    usable = _cuda_usable(torch)
    driver = driver_version()
    if torch:
        missing += gpu_advice(driver, torch.__version__, torch.version.cuda, usable)
    return {
        "elmo_stream": _version("elmo-stream"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": versions,
        "cpu": {
            "isa": torch.backends.cpu.get_cpu_capability() if torch else None,
            "flags": matrix_flags(),
            "count": available_cpus(),
        },
        "memory": memory_bytes(),
        "threads": {
            "torch": torch.get_num_threads() if torch else None,
            "numba": numba.get_num_threads() if numba else None,
        },
        "gpus": [_gpu(torch, i) for i in range(torch.cuda.device_count())] if usable else [],
        "driver": driver,
        "backends": _backends(torch, usable, missing),
        "missing": missing,
    }


def gpu_advice(driver: str | None, torch: str, cuda: str | None, usable: bool) -> list[str]:
    """Why no GPU is used, and what to do: one sentence, or none where a GPU is used.

    Args:
        driver: version of the NVIDIA driver, None where none is loaded.
        torch, cuda: version of torch, and of the CUDA it was built for; None for a build without.
        usable: whether torch can use a GPU.
    """
    if usable:
        return []
    if driver is None:
        return ["No NVIDIA driver was found, so training uses the CPU; a GPU needs its driver."]
    if cuda is None:
        return [
            f"NVIDIA driver {driver} is loaded, but torch {torch} is a build without CUDA, so training uses "
            "the CPU: `make gpu` installs the CUDA build."
        ]
    return [
        f"torch {torch} finds no GPU that works under NVIDIA driver {driver}, so training uses the CPU: "
        f"update the driver to one for CUDA {cuda}, and look whether CUDA_VISIBLE_DEVICES or a container "
        "hides the GPU."
    ]


def driver_version(path: Path = NVIDIA_DRIVER) -> str | None:
    """Version of the loaded NVIDIA driver (Linux), or None."""
    found = re.search(r"^NVRM version:.*?\s(\d+\.\d+(?:\.\d+)?)\s", _read(path), re.MULTILINE)
    return found[1] if found else None


def matrix_flags(path: Path = CPU_INFO) -> list[str]:
    """The AMX and AVX-512 instruction sets that the CPU names (Linux)."""
    found = re.search(r"^flags\s*:(.*)$", _read(path), re.MULTILINE)
    return sorted(flag for flag in (found[1].split() if found else []) if flag.startswith(("amx", "avx512")))


def memory_bytes(path: Path = MEMORY_INFO) -> dict[str, int | None]:
    """Total memory, and what can be had without swapping (Linux)."""
    kib = {key: int(value) for key, value in re.findall(r"^(\w+):\s*(\d+) kB$", _read(path), re.MULTILINE)}
    return {
        name: kib[key] * 1024 if key in kib else None
        for name, key in (("total", "MemTotal"), ("available", "MemAvailable"))
    }


def render(report: dict[str, Any]) -> str:
    """The report as lines of text for a terminal."""
    cpu, memory, gpus, packages = report["cpu"], report["memory"], report["gpus"], report["packages"]
    rows = [
        ("elmo-stream", report["elmo_stream"] or "runs from its sources, not installed"),
        ("Python", f"{report['python']} on {report['platform']}"),
        (
            "CPU",
            " ".join([f"{cpu['count']} usable,", cpu["isa"] or "ISA unknown", *cpu["flags"]]),
        ),
        ("memory", f"{_gib(memory['total'])}, {_gib(memory['available'])} available"),
        ("threads", _pairs(report["threads"])),
        *(
            (f"GPU {i}", f"{gpu['name']}, {_gib(gpu['memory'])}, capability {gpu['capability']}")
            for i, gpu in enumerate(gpus)
        ),
        *([] if gpus else [("GPU", "none usable")]),
        ("driver", report["driver"] or ("unknown" if gpus else "none found")),
        ("kernels", _pairs(report["backends"])),
        ("packages", _pairs({name: version for name, version in packages.items() if version})),
    ]
    width = max(len(name) for name, _ in rows)
    lines = [
        fill(text, LINE, initial_indent=f"{name:<{width}}  ", subsequent_indent=" " * (width + 2))
        for name, text in rows
    ]
    missing = [f"missing: {text}" for text in report["missing"]] or ["Nothing is missing."]
    return "\n".join([*lines, "", *missing])


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _load(name: str, version: str | None, missing: list[str]) -> Any:
    """The module, or None; an installed one that cannot be loaded is added to what is missing."""
    if version is None:
        return None
    try:
        return importlib.import_module(name)
    except Exception as error:  # a broken installation may raise anything
        cause = (str(error).splitlines() or [""])[0]
        missing.append(
            f"{name} {version} cannot be loaded ({type(error).__name__}: {cause}); it is needed for "
            f"{NEEDED_FOR[name]}: pip install --force-reinstall {name}=={version}"
        )
        return None


def _cuda_usable(torch: Any) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an old driver is told in a sentence instead
        return bool(torch and torch.cuda.is_available())


def _gpu(torch: Any, index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    return {
        "name": properties.name,
        "memory": properties.total_memory,
        "capability": f"{properties.major}.{properties.minor}",
    }


def _backends(torch: Any, usable: bool, missing: list[str]) -> dict[str, str | None]:
    """Kernel backend of each device; None for a device without one."""
    backends: dict[str, str | None] = {"cpu": None, "cuda": None}
    if not torch:
        return backends
    import elmo_kernels

    for device in ("cpu", "cuda") if usable else ("cpu",):
        try:
            backends[device] = elmo_kernels.backend_name(torch.device(device))
        except ValueError as error:
            missing.append(f"No kernels for {device}: {error}")
    return backends


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _gib(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 2**30:.1f} GiB"


def _pairs(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {'none' if value is None else value}" for name, value in values.items())
