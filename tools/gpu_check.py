"""Everything a GPU has to show, in one command that fits in nine minutes on a fresh machine.

    python3 tools/gpu_check.py --out gpu-check --peer ../elmo
    python3 tools/gpu_check.py --out dry --dry-run      # on a CPU, with tiny shapes: tries every part

The machine needs Python, torch, triton, numba, pytest, numpy and safetensors; this checkout need not be installed.
Parts of the tests also need zarr, numcodecs, torch-optimi, webdataset or torchao: without a network, carry them as
wheels and put their folder into PYTHONPATH; without them those tests are reported as errors of their collection.

Each section is a process of its own with a time budget, so that none can spoil or starve another. The tables come
last; ``OUT/gpu-check.json`` holds all rows with the GPU's name, driver and versions, ``OUT/*.log`` the output of each
section. Exit code 1 when a section failed or was cut off.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from tools.tables import table  # noqa: E402  (found only once the checkout is on the path)

LOG_LINES = 40
LEAST_SECONDS = 1.0
"""What a section gets when no time is left: too little, so that it is reported as cut off."""
NO_TESTS = 5
"""Exit code of pytest when it selected no test."""


@dataclass(frozen=True)
class Section:
    """A process: arguments for Python, and the most seconds it may take; tools also take ``--json`` and ``--tiny``."""

    name: str
    arguments: tuple[str, ...]
    budget: float

    @property
    def is_tool(self) -> bool:
        """Whether it writes rows, rather than being the test runner."""
        return self.arguments[1].startswith("tools.")


def bench(name: str, budget: float, formats: str, *shapes: str, kahan: str = "0") -> Section:
    """A section of kernel benchmarks."""
    options = ("--shapes", *shapes, "--formats", *formats.split(), "--kahan-head", kahan)
    return Section(name, ("-m", "tools.bench_kernels", *options), budget)


SECTIONS = (
    Section("tests", ("-m", "pytest", "-m", "gpu", "-q", "--continue-on-collection-errors", "tests"), 110),
    Section("roofline", ("-m", "tools.roofline"), 25),
    bench("3m", 95, "fp8 bf16", "2812281x768x128", kahan="0.2"),
    bench("1.3m", 45, "fp8", "1305265x768x512"),
    bench("8.6m", 60, "fp8", "8623847x768x128", "8623847x768x2048"),
    Section("overflow", ("-m", "tools.bench_streaming"), 130),
    Section("model", ("-m", "tools.bench_model"), 40),
    bench("fp32", 25, "fp32 bf16", "670091x768x128"),
)


@dataclass(frozen=True)
class Outcome:
    """What a section came to: "passed", "failed", or "cut off", and what it wrote."""

    section: Section
    verdict: str
    seconds: float
    log: Path
    content: dict[str, Any]


def run(section: Section, options: argparse.Namespace, budget: float) -> Outcome:
    """Run a section in its own session of processes and end all of them when its time is over."""
    log, written = options.out / f"{section.name}.log", options.out / f"{section.name}.json"
    written.unlink(missing_ok=True)
    command = [sys.executable, *section.arguments]
    if section.is_tool:
        command += ["--json", str(written), *(["--device", "cpu", "--tiny"] if options.dry_run else [])]
    if options.peer and "tools.bench_kernels" in command:
        command += ["--peer", str(options.peer)]
    begin = time.monotonic()
    with open(log, "w", encoding="utf-8") as stream:
        process = subprocess.Popen(
            command, stdout=stream, stderr=subprocess.STDOUT, cwd=ROOT, env=_environment(), start_new_session=True
        )
        try:
            code: int | None = process.wait(budget)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            code = None
    allowed = (0,) if section.is_tool else (0, NO_TESTS)
    verdict = "cut off" if code is None else "passed" if code in allowed else f"failed ({code})"
    content = json.loads(written.read_text(encoding="utf-8")) if written.exists() else {}
    return Outcome(section, verdict, time.monotonic() - begin, log, content)


def _environment() -> dict[str, str]:
    """Paths to this checkout's packages before those of the caller."""
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}


def report(outcomes: list[Outcome]) -> str:
    """The end of the log of what has no rows, then the tables, then the verdicts."""
    parts = []
    for outcome in outcomes:
        rows, columns = outcome.content.get("rows"), outcome.content.get("columns")
        if rows:
            names = columns or list(dict.fromkeys(name for row in rows for name in row if name != "error"))
            body = table(rows, names)
        else:
            body = "\n".join(outcome.log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:])
        parts.append(f"== {outcome.section.name}\n{body}")
    verdicts = [{"section": o.section.name, "verdict": o.verdict, "seconds": round(o.seconds)} for o in outcomes]
    return "\n\n".join([*parts, table(verdicts, ("section", "verdict", "seconds"))])


def main() -> int:
    """Run the sections in order, print and write what they came to."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--out", type=Path, default=Path("gpu-check"), metavar="FOLDER", help="for logs and JSON")
    parser.add_argument(
        "--peer", type=lambda text: Path(text).resolve(), metavar="FOLDER", help="see tools.bench_kernels"
    )
    parser.add_argument("--minutes", type=float, default=8.8, help="for all sections together")
    parser.add_argument("--only", nargs="+", choices=[section.name for section in SECTIONS], metavar="SECTION")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, with tiny shapes")
    options = parser.parse_args()
    options.out = options.out.resolve()
    options.out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * options.minutes
    outcomes: list[Outcome] = []
    for section in SECTIONS:
        if options.only and section.name not in options.only:
            continue
        left = end - time.monotonic()
        # A dry run on a slow CPU is no failure: only the whole has a limit.
        budget = max(LEAST_SECONDS, left if options.dry_run else min(section.budget, left))
        print(f"{section.name}: at most {budget:.0f} s", flush=True)
        outcomes.append(run(section, options, budget))
    machine: dict[str, str] = next((o.content["machine"] for o in outcomes if "machine" in o.content), {})
    sections = [{"section": o.section.name, "verdict": o.verdict, "seconds": o.seconds, **o.content} for o in outcomes]
    text = json.dumps({"machine": machine, "sections": sections}, indent=1)
    (options.out / "gpu-check.json").write_text(text + "\n", encoding="utf-8")
    print("\n".join(f"# {name}: {value}" for name, value in machine.items()))
    print(report(outcomes))
    return int(any(outcome.verdict != "passed" for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
