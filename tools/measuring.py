"""What the benchmarks share: times, memory, the machine, JSON. Run them as ``python -m tools.NAME``."""

import argparse
import functools
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from tools.tables import Row, table

Work = Callable[[], object]
MIB = 2**20
WARM_UPS = 3


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def times_ms(work: Work, device: torch.device, *, repeats: int) -> list[float]:
    """Milliseconds of each repetition, after warm-ups: by events on a GPU, by the clock on a CPU."""
    for _ in range(min(WARM_UPS, repeats)):
        work()
    synchronize(device)
    if device.type != "cuda":
        return [clocked_ms(work) for _ in range(repeats)]
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for begin, end in events:
        begin.record()
        work()
        end.record()
    synchronize(device)
    return [begin.elapsed_time(end) for begin, end in events]


def median_ms(work: Work, device: torch.device, *, repeats: int) -> float:
    """Median of ``times_ms``."""
    return statistics.median(times_ms(work, device, repeats=repeats))


def clocked_ms(work: Work) -> float:
    """Milliseconds of one call by the clock."""
    begin = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - begin)


def transient_bytes(work: Work, device: torch.device) -> int | None:
    """Most memory of the GPU's allocator beyond what is held before, while calls compile, capture and run.

    None on a CPU.
    """
    if device.type != "cuda":
        return None
    synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    for _ in range(WARM_UPS):
        work()
    synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def captured(work: Work, device: torch.device) -> tuple[Work, str]:
    """The work as the replay of a CUDA graph, so that gaps between launches do not count, and how it runs.

    Where it cannot be captured it is returned as it is.
    """
    if device.type != "cuda":
        return work, "eager"
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream(device).wait_stream(stream)
    synchronize(device)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            work()
    except Exception as error:  # torch raises several types; the row then shows that it ran eagerly, and why
        synchronize(device)
        return work, f"eager ({said(error)})"
    return graph.replay, "graph"


def attempt(row: Row, measure: Callable[[], Row]) -> Row:
    """The row with what ``measure`` adds, or with ``error``: one failure does not end a benchmark."""
    try:
        return row | measure()
    except Exception as error:  # reported in the table, and by the exit code of the tool
        return row | {"error": said(error)}


def said(error: Exception) -> str:
    """An error in one line."""
    first = (str(error).strip().splitlines() or ["no message"])[0]
    return f"{type(error).__name__}: {first[:160]}"


@functools.cache
def environment(device: torch.device) -> dict[str, str]:
    """Device, driver and versions, for every published figure."""
    found = {"python": platform.python_version(), "torch": torch.__version__, "system": platform.platform()}
    try:
        import triton

        found["triton"] = triton.__version__
    except ImportError:
        found["triton"] = "not installed"
    if device.type != "cuda":
        return found | {
            "device": f"cpu, {torch.get_num_threads()} threads",
            "isa": torch.backends.cpu.get_cpu_capability(),
        }
    properties = torch.cuda.get_device_properties(device)
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        driver = "unknown"
    size = f"{properties.total_memory / 2**30:.1f} GiB"
    name = f"{properties.name}, sm_{properties.major}{properties.minor}, {size}"
    return found | {"device": name, "driver": driver, "cuda": str(torch.version.cuda)}


def parser(description: str | None, *, tiny: str) -> argparse.ArgumentParser:
    """The options that every benchmark has: ``--device``, ``--json``, ``--tiny`` (``tiny`` says what that does)."""
    raw = argparse.RawDescriptionHelpFormatter
    made = argparse.ArgumentParser(description=description, formatter_class=raw)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    made.add_argument("--device", type=torch.device, default=torch.device(default), help="cuda or cpu")
    made.add_argument(
        "--json", type=Path, metavar="FILE", help="write the rows, the command's settings and the machine"
    )
    made.add_argument("--tiny", action="store_true", help=tiny)
    return made


def write_json(options: argparse.Namespace, rows: Sequence[Row], **more: Any) -> None:
    """Write what was measured so far, where ``--json`` asks for it; a run that is killed leaves whole rows."""
    if options.json is None:
        return
    settings = {name: str(value) for name, value in vars(options).items()}
    content = {"machine": environment(options.device), "settings": settings, "rows": list(rows), **more}
    scratch = options.json.with_name(f"{options.json.name}.tmp")
    scratch.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    scratch.replace(options.json)


def finish(options: argparse.Namespace, rows: Sequence[Row], columns: Sequence[str], **more: Any) -> int:
    """Print the machine and the table, write the JSON; 1 when a row failed."""
    print("\n".join(f"# {name}: {value}" for name, value in environment(options.device).items()))
    print(table(rows, columns))
    write_json(options, rows, columns=list(columns), **more)
    return int(any("error" in row for row in rows))
