"""Commands under strace, from their first call after the fork on."""

import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.torture.children import Outcome, forked
from tests.torture.tally import Unavailable


def require_strace() -> None:
    """Raise ``Unavailable`` where commands cannot be traced."""
    if shutil.which("strace") is None:
        raise Unavailable("needs strace")
    if subprocess.run(["strace", "-o", os.devnull, "true"], capture_output=True).returncode:
        raise Unavailable("needs the right to trace processes")


def traced(
    arguments: Sequence[object], log: Path, options: Callable[[int], list[str]], call: str | None = None
) -> tuple[int, Outcome, list[str]]:
    """Run a command under strace; returns its process id, how it ended, and the lines of the trace.

    ``options`` gives strace's, by the process id, before the command begins; ``call`` as in ``Children.start``.
    """
    pid = forked().start(*arguments, log=log, stopped=True, call=call)
    record = log.with_suffix(".strace")
    command = ["strace", "-f", "-qq", "-o", str(record), *options(pid), "-p", str(pid)]
    forked().wait_until_stopped(pid)
    tracer = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while tracer.poll() is None and "TracerPid:\t0\n" in Path(f"/proc/{pid}/status").read_text():
        os.sched_yield()
    forked().send(pid, signal.SIGCONT)
    outcome = forked().wait(pid, log)
    said = tracer.communicate()[1]
    if "attach" in said and tracer.returncode:
        raise Unavailable(f"needs the right to trace processes: {said.strip()}")
    return pid, outcome, record.read_text().splitlines()
