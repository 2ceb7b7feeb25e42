"""R3: the N-th system call of a kind fails, or writes are cut short, while sharding, training and predicting.

``failing_calls.c`` makes a call fail below Python, whoever made it. Calls count that name a file of the input or the
output; an undisturbed command tells how many there are.
"""

import errno
import itertools
import platform
import queue
import random
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from elmo_stream.errors import ElmoStreamError
from elmo_stream.inspection import verify
from elmo_stream.system import available_cpus
from elmo_stream.training.checkpoint import checkpoint_steps
from tests.torture.children import Blow, Children, Failure, Outcome
from tests.torture.tally import Tally, Unavailable
from tests.torture.tracing import traced
from tests.torture.workplace import FORMATS, Workplace, must, result_of, tree

SHORT, FULL = "short write", "full disk"
KINDS = {
    "ENOSPC": (errno.ENOSPC, "open mkdir write truncate rename sync"),
    "EIO": (errno.EIO, "open read write rename sync"),
    "EACCES": (errno.EACCES, "open mkdir rename remove"),
    "EMFILE": (errno.EMFILE, "open"),
    SHORT: (-1, "write"),
    FULL: (-2, "write"),
}
AGAIN = "shard again"
_SHARDING = ("shard", AGAIN)
VERBS = (*_SHARDING, "train", "resume", "predict")
_EVERY_STEPS = 8
_REFUSED, _IO = 2, 74
_COUNTER_BYTES = 24


@dataclass(frozen=True)
class Fault:
    """The ``number``-th call of a kind fails; a short write succeeds by half, after which a full disk takes nothing."""

    verb: str
    kind: str
    number: int


@dataclass(frozen=True)
class Attempt:
    """A command under a fault: how it ended, whether the fault came, and whether what it left is lost or wrong."""

    outcome: Outcome
    hit: bool
    lost: bool
    silent: bool


def attack(tries: int, folder: Path, seed: int) -> Tally:
    """At most ``tries`` faults, chosen at random among all; the same command without the fault must then succeed."""
    tally, rng = Tally(), random.Random(seed)
    pairs = [(verb, kind) for verb in VERBS for kind in KINDS]
    rng.shuffle(pairs)
    with closing(Bench(folder)) as bench, ThreadPoolExecutor(len(bench.servers)) as pool:
        faults = [fault for pair in pairs[:tries] for fault in bench.faults(*pair)]
        rng.shuffle(faults)
        for fault, attempt in zip(faults[:tries], pool.map(bench.attempt, faults[:tries]), strict=True):
            tally.tries += attempt.hit
            tally.judge(
                f"{fault}: exit {attempt.outcome.code}, {attempt.outcome.output[-500:]}",
                traceback=attempt.outcome.traceback,
                lost=attempt.lost,
                silent=partial(bool, attempt.silent),
            )
    return tally


class Bench:
    """The commands under attack, what they work on, and what undisturbed ones give."""

    def __init__(self, folder: Path) -> None:
        folder = folder.resolve()
        self.folder, self._logs, self._number = folder / "work", folder / "logs", itertools.count()
        self.folder.mkdir(), self._logs.mkdir()
        self._library = _compiled(folder)
        self.servers = [Children() for _ in range(min(4, available_cpus()))]
        self._idle: queue.SimpleQueue[Children] = queue.SimpleQueue()
        for server in self.servers:
            self._idle.put(server)
        self.place = Workplace(self.folder)
        self._run = self.folder / "whole"
        self._undisturbed("train", self._run)
        self._begun = {"resume": self.folder / "begun", AGAIN: self.folder / "killed"}
        stop = Blow(signal.SIGTERM, line=3)  # at the edge of the first epoch
        began = self.servers[0].run(*self._arguments("train", self._begun["resume"]), log=self.place.log, blow=stop)
        assert began.code == 128 + signal.SIGTERM, began
        kill = Blow(call=12, below=str(self._begun[AGAIN] / "test"))  # while the last shard is written
        killed = self.servers[0].run(*self._arguments("shard", self._begun[AGAIN]), log=self.place.log, blow=kill)
        assert killed.code == -signal.SIGKILL, killed
        self._undisturbed("predict", self.folder / "whole.jsonl")
        self._undisturbed("shard", self.folder / "whole.store")
        self._expected_run = result_of(self._run)
        self._expected_lines = (self.folder / "whole.jsonl").read_bytes()
        self._expected_store = tree(self.folder / "whole.store")

    def close(self) -> None:
        """End the processes that fork."""
        for server in self.servers:
            server.close()

    def _undisturbed(self, verb: str, out: Path) -> None:
        must(self.servers[0].run(*self._arguments(verb, out), log=self.place.log))

    def _arguments(self, verb: str, out: Path) -> tuple[object, ...]:
        if verb in _SHARDING:
            return self.place.shard_arguments(out, rows=400)
        return {
            "train": (*self.place.train_arguments(out, FORMATS[1]), "--set", f"checkpoint.every_steps={_EVERY_STEPS}"),
            "resume": ("resume", out),
            "predict": ("predict", self._run, self.place.texts, "--out", out),
        }[verb]

    def faults(self, verb: str, kind: str) -> list[Fault]:
        """Every fault of a kind that can come."""
        _, calls = KINDS[kind]
        return [Fault(verb, kind, number + 1) for number in range(self.count(verb, calls))]

    def count(self, verb: str, calls: str) -> int:
        """How many calls an undisturbed command makes, of kinds between spaces as ``failing_calls.c`` names them."""
        out = self._prepare(verb)
        outcome, count, _ = self._run_with(self.servers[0], verb, out, calls, 0, 0)
        must(outcome)
        return count

    def trace(self, verb: str, options: list[str]) -> list[str]:
        """What strace prints of an undisturbed command."""
        _, outcome, lines = traced(self._arguments(verb, self._prepare(verb)), self._logs / "log", lambda _: options)
        must(outcome)
        return lines

    def attempt(self, fault: Fault) -> Attempt:
        """Run a command under a fault, look at what it left, and run it again without."""
        server = self._idle.get()
        try:
            out = self._prepare(fault.verb)
            before = _everything(out.parent)
            error, calls = KINDS[fault.kind]
            outcome, count, call = self._run_with(server, fault.verb, out, calls, error, fault.number)
            hit = count >= fault.number
            succeeded = outcome.code == 0
            named = outcome.code == _IO and f"error: {self.folder}/" in outcome.output
            told = call != "sync" if succeeded else named  # what could not be flushed may be gone tomorrow
            whole = told and (succeeded or fault.kind != SHORT) and self._intact(fault.verb, out, succeeded)
            if not whole:
                return Attempt(outcome, hit, lost=True, silent=False)
            # A command that left everything as it was would do now what it did undisturbed.
            same = not succeeded and _everything(out.parent) == before
            silent = not same and self._fails_after(server, fault.verb, out, succeeded)
            shutil.rmtree(out.parent)
            return Attempt(outcome, hit, lost=False, silent=silent)
        finally:
            self._idle.put(server)

    def _prepare(self, verb: str) -> Path:
        """A new place for the output of a command; with what is half done already where it is to go on."""
        out = self.folder / f"out-{next(self._number)}" / ("out.jsonl" if verb == "predict" else "out")
        out.parent.mkdir()
        if verb in self._begun:
            shutil.copytree(self._begun[verb], out)
        return out

    def _run_with(
        self, server: Children, verb: str, out: Path, calls: str, error: int, number: int
    ) -> tuple[Outcome, int, str]:
        """The command with the failure of a call; how many such calls it made, and what kind of call failed."""
        log, counter = self._logs / out.parent.name, self._logs / f"{out.parent.name}.count"
        counter.write_bytes(bytes(_COUNTER_BYTES))
        failure = Failure(str(self._library), str(self.folder), calls, error, number, str(counter))
        outcome = server.run(*self._arguments(verb, out), log=log, failure=failure)
        shared = counter.read_bytes()
        return outcome, int.from_bytes(shared[:8], "little"), shared[8:].rstrip(b"\0").decode().strip()

    def _intact(self, verb: str, out: Path, succeeded: bool) -> bool:
        """Whether what was there before is whole still, and nothing half done looks done."""
        if verb == "predict":
            return succeeded or tree(out.parent) in ({}, {out.name: self._expected_lines})
        if succeeded:
            return True
        if verb in _SHARDING:
            return not (out / "index.json").exists() or _without_scratch(out) == self._expected_store
        if (out / "run.json").is_file():
            try:
                verify(out)
            except ElmoStreamError:
                return False
        return verb == "train" or checkpoint_steps(out)[-1:] >= checkpoint_steps(self._begun[verb])[-1:]

    def _fails_after(self, server: Children, verb: str, out: Path, succeeded: bool) -> bool:
        """Whether the command fails now, or gives something else than one without a fault."""
        if not succeeded:
            again = "resume" if (out / "run.json").is_file() else verb
            code = server.run(*self._arguments(again, out), log=self._logs / f"{out.parent.name}-again").code
            there = code == _REFUSED and (out.is_file() or (out / "index.json").exists())
            if code and not there:  # what fails after its last file is there, and so refused
                return True
        if verb == "predict":
            return out.read_bytes() != self._expected_lines
        if verb in _SHARDING:
            return tree(out) != self._expected_store
        return result_of(out) != self._expected_run


def _compiled(folder: Path) -> Path:
    source, library = Path(__file__).with_name("failing_calls.c"), folder / "failing_calls.so"
    if (sys.platform, platform.machine()) != ("linux", "x86_64") or shutil.which("cc") is None:
        raise Unavailable("needs Linux on x86-64 and a C compiler")
    subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-o", library, source], check=True)
    return library


def _everything(folder: Path) -> dict[str, bytes | None]:
    """The content of every file below a folder, and the folders, which have none."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def _without_scratch(store: Path) -> dict[str, bytes]:
    """The content of a store whose scratch was not removed yet."""
    return {name: data for name, data in tree(store).items() if not name.startswith(".build/")}
