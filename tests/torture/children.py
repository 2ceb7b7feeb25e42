"""Commands in processes of their own, forked from one process that has imported everything and started no thread.

Importing torch takes seconds, what the attacks train less than one. A child runs the command line, ends as a user's
process does up to the moment where the interpreter would take itself apart, and dies by real signals: after some
seconds, before its n-th call that opens or renames something below a folder, or after its n-th line of output. Run as
``python -m tests.torture.children`` it is the process that forks.
"""

import atexit
import ctypes
import gc
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tests.torture.tally import Unavailable

ROOT = Path(__file__).parents[2]
_IMPORTED = (  # nothing that starts threads, which no fork survives
    "elmo_kernels.rounding_numba",
    "elmo_stream.cli",
    "elmo_stream.data.shard",
    "elmo_stream.data.store_zarr",
    "elmo_stream.inspection",
    "elmo_stream.training.predict",
    "elmo_stream.training.trainer",
    "numba.np.linalg",
    "scipy.linalg",
    "tensorboard.compat.proto.event_pb2",
    "tensorboard.summary.writer.record_writer",
    "torch._inductor",
    "torch._subclasses.fake_tensor",
)
_AUDITED = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.listdir", "os.scandir"}


@dataclass(frozen=True)
class Blow:
    """When and with what a child is hit: the first of the given conditions; ``below`` limits ``call`` to a folder."""

    signal: int = signal.SIGKILL
    seconds: float | None = None
    call: int | None = None
    line: int | None = None
    below: str = ""
    times: int = 1


@dataclass(frozen=True)
class Failure:
    """``failing_calls.c``, compiled, and its arguments: which calls are counted, and which of them fails with what."""

    library: str
    below: str
    kinds: str
    error: int
    number: int
    counter: str


@dataclass(frozen=True)
class Outcome:
    """How a child ended: its exit code, or minus the signal that killed it, and all it printed."""

    code: int
    output: str

    @property
    def traceback(self) -> bool:
        """Whether the user saw one."""
        return "Traceback" in self.output


class Children:
    """Starts commands; they are forked from a process that ends with this one."""

    def __init__(self) -> None:
        if sys.platform != "linux":
            raise Unavailable("needs Linux")
        # Without coverage: a signal that arrives inside it leaves its lock held.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")}
        environment |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"), "1")
        environment |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.torture.children"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=ROOT,
        )
        atexit.register(self.close)

    def close(self) -> None:
        """End the process that forks; a second call does nothing."""
        atexit.unregister(self.close)
        self._process.communicate()  # the end of its input ends it

    def start(
        self,
        *arguments: object,
        log: Path,
        blow: Blow | None = None,
        stopped: bool = False,
        call: str | None = None,
        failure: Failure | None = None,
    ) -> int:
        """Start a command whose output goes to ``log``; returns its process id.

        Args:
            stopped: it waits for SIGCONT before it begins.
            call: ``module:function`` to call with the arguments, instead of the command line.
            failure: a system call that fails.
        """
        return self._ask(
            do="start",
            arguments=[str(argument) for argument in arguments],
            log=str(log),
            blow=asdict(blow) if blow else None,
            stopped=stopped,
            call=call,
            failure=asdict(failure) if failure else None,
        )

    def wait(self, pid: int, log: Path, blow: Blow | None = None) -> Outcome:
        """Wait for a child to end, and hit it meanwhile where the blow comes after seconds."""
        code = self._ask(do="wait", pid=pid, blow=asdict(blow) if blow else None)
        return Outcome(code, log.read_text(errors="replace"))

    def wait_until_stopped(self, pid: int) -> int:
        """Wait until a child is stopped, by the signal that is returned."""
        return self._ask(do="wait until stopped", pid=pid)

    def send(self, pid: int, number: int) -> None:
        """Send a signal to a child that was not waited for."""
        os.kill(pid, number)

    def run(self, *arguments: object, log: Path, blow: Blow | None = None, **how: Any) -> Outcome:
        """Start a command and wait for it; ``how`` as in ``start``."""
        return self.wait(self.start(*arguments, log=log, blow=blow, **how), log, blow)

    def _ask(self, **request: Any) -> int:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())


@cache
def forked() -> Children:
    """Those that all attacks of this process share."""
    return Children()


def _warm_up() -> None:
    """Let the libraries build once, without a thread, the tables that they build at their first use."""
    import numba
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    numba.njit(lambda value: value + 1)(1)
    with FakeTensorMode():
        weight = torch.empty(4, 4, requires_grad=True)
        (torch.nn.functional.embedding_bag(torch.zeros(2, 2, dtype=torch.int64), weight) @ weight).sum().backward()
    assert len(os.listdir("/proc/self/task")) == 1


def _serve() -> None:
    """Fork a child for every request; a child leaves this loop and ends as the main program of a process does."""
    requests = sys.stdin
    while line := requests.readline():
        request = json.loads(line)
        blow = Blow(**request["blow"]) if request.get("blow") else None
        if request["do"] == "wait":
            answer = _wait(request["pid"], blow)
        elif request["do"] == "wait until stopped":
            answer = os.WSTOPSIG(os.waitpid(request["pid"], os.WUNTRACED)[1])
        else:
            answer = os.fork()
            if not answer:
                return _become(request, blow)
        print(answer, flush=True)


def _wait(pid: int, blow: Blow | None) -> int:
    if blow is not None and blow.seconds is not None:
        descriptor = os.pidfd_open(pid)
        for _ in range(blow.times):
            if not select.select([descriptor], [], [], blow.seconds)[0]:
                signal.pidfd_send_signal(descriptor, blow.signal)
        os.close(descriptor)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _become(request: dict[str, Any], blow: Blow | None) -> None:
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    for target in (1, 2):
        os.dup2(log, target)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if request["stopped"]:
        os.kill(os.getpid(), signal.SIGSTOP)
    if blow is not None and blow.call is not None:
        _hit_before_call(blow, blow.call)
    if blow is not None and blow.line is not None:
        sys.stderr = _HitAfterLine(blow, blow.line)  # type: ignore[assignment]
    if request["failure"]:
        _arm(Failure(**request["failure"]))
    if request["call"]:
        module, function = request["call"].split(":")
        getattr(importlib.import_module(module), function)(*request["arguments"])
        return
    from elmo_stream.cli import main

    sys.argv = ["elmo-stream", *request["arguments"]]
    try:
        main(prog_name="elmo-stream")
    except SystemExit as end:
        _end(int(end.code or 0))


def _end(code: int) -> None:
    """End as a process does, but for freeing all modules piece by piece, which takes longer than many an attack."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code)


def _arm(failure: Failure) -> None:
    below, kinds, counter = (text.encode() for text in (failure.below, failure.kinds, failure.counter))
    library = ctypes.CDLL(failure.library, use_errno=True)
    if library.arm_fault(below, kinds, failure.error, ctypes.c_long(failure.number), counter):
        raise OSError(ctypes.get_errno(), "arm_fault")


def _hit(blow: Blow) -> None:
    for _ in range(blow.times):
        os.kill(os.getpid(), blow.signal)


def _hit_before_call(blow: Blow, left: int) -> None:
    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        if event in _AUDITED and str(arguments[0]).startswith(blow.below):
            left -= 1
            if left == 0:
                _hit(blow)

    sys.addaudithook(hook)


class _HitAfterLine:
    """The error stream of a child that is hit as soon as so many lines were written."""

    def __init__(self, blow: Blow, left: int) -> None:
        self._blow, self._left, self._stream = blow, left, sys.stderr

    def write(self, text: str) -> int:
        written = self._stream.write(text)
        self._stream.flush()
        if text.endswith("\n"):
            self._left -= 1
            if self._left == 0:
                _hit(self._blow)
        return written

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


if __name__ == "__main__":
    for name in _IMPORTED:
        importlib.import_module(name)
    _warm_up()
    gc.collect()
    gc.freeze()  # else every collection in a child, and its end, would copy the pages of all modules
    _serve()
