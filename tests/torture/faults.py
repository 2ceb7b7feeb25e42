"""R3: the N-th system call of a kind fails, or writes are cut short, while sharding, training and predicting.

strace makes a call fail below Python, whoever made it. Only calls that name a file of the output are counted; which
files these are is known from an undisturbed command that was traced. Short writes are made by a limit on file sizes.
"""

import random
import re
import shutil
import signal
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from elmo_stream.errors import ElmoStreamError
from elmo_stream.inspection import verify
from elmo_stream.training.checkpoint import checkpoint_steps
from tests.torture.children import Blow, Outcome, forked
from tests.torture.tally import Tally
from tests.torture.tracing import require_strace, traced
from tests.torture.workplace import FORMATS, Workplace, must, result_of, tree

KINDS = {
    "ENOSPC": "openat,mkdir,write,pwrite64,writev,ftruncate,rename,renameat,fsync,fdatasync",
    "EIO": "openat,read,pread64,write,pwrite64,writev,rename,renameat,fsync,fdatasync",
    "EACCES": "openat,mkdir,rename,renameat,unlink",
    "EMFILE": "openat",
}
SHORT = "short write"
_SHORT_TRIES = 60
_VERBS = ("shard", "train", "resume", "predict")
_IO = 74


@dataclass(frozen=True)
class Fault:
    """The ``number``-th call of a kind fails; of short writes, no file grows beyond ``number`` bytes."""

    verb: str
    kind: str
    number: int


def attack(tries: int, folder: Path, seed: int) -> Tally:
    """At most ``tries`` faults, chosen at random among all; the same command without the fault must then succeed."""
    require_strace()
    bench, tally = _Bench(folder), Tally()
    faults = bench.faults()
    random.Random(seed).shuffle(faults)
    for fault in faults:
        if tally.tries == tries:
            break
        out = bench.prepare(fault.verb)
        outcome, hit = bench.run(fault.verb, out, fault)
        tally.tries += hit
        succeeded = outcome.code == 0
        told = succeeded or (outcome.code == _IO and str(bench.folder) in outcome.output)
        tally.judge(
            f"{fault}: exit {outcome.code}, {outcome.output[-500:]}",
            traceback=outcome.traceback,
            lost=not outcome.traceback and not (told and bench.intact(fault.verb, out, succeeded)),
            silent=partial(bench.fails_after, fault.verb, out, succeeded),
        )
    return tally


class _Bench:
    """The commands under attack, what they work on, and what an undisturbed one gives."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.place, self._number = folder, Workplace(folder), 0
        self._run, self._begun = folder / "whole", folder / "begun"
        must(self.place.go_on(self._run, FORMATS[1]))
        stop = Blow(signal.SIGTERM, line=3)  # at the edge of the first epoch
        assert self.place.go_on(self._begun, FORMATS[1], stop).code == 128 + signal.SIGTERM
        must(forked().run(*self._arguments("predict", folder / "whole.jsonl"), log=self.place.log))
        self._expected_run = result_of(self._run)
        self._expected_lines = (folder / "whole.jsonl").read_bytes()
        self._traces = {verb: self._trace(verb) for verb in _VERBS}
        self._expected_store = tree(self._traces["shard"][2])

    def _arguments(self, verb: str, out: Path) -> tuple[object, ...]:
        return {
            "shard": self.place.shard_arguments(out, rows=400),
            "train": self.place.train_arguments(out, FORMATS[1]),
            "resume": ("resume", out),
            "predict": ("predict", self._run, self.place.texts, "--out", out),
        }[verb]

    def prepare(self, verb: str) -> Path:
        """A new place for the output of a command; a run that is half done for ``resume``."""
        self._number += 1
        out = self.folder / f"out-{self._number:06d}" / ("out.jsonl" if verb == "predict" else "out")
        out.parent.mkdir()
        if verb == "resume":
            shutil.copytree(self._begun, out)
        return out

    def run(self, verb: str, out: Path, fault: Fault) -> tuple[Outcome, bool]:
        """The command under a fault, and whether the fault came."""
        arguments, log = self._arguments(verb, out), self.place.log
        if fault.kind == SHORT:
            outcome = forked().run(*arguments, log=log, most_bytes=fault.number)
            return outcome, outcome.code != 0
        lines, old_pid, old_out = self._traces[verb]
        pattern = rf'["<]({re.escape(str(old_out.parent))}/[^">]*)[">]'
        old_paths = sorted(set(re.findall(pattern, "\n".join(lines))))

        def options(pid: int) -> list[str]:
            paths = [path.replace(str(old_out), str(out)) for path in old_paths]
            paths = [re.sub(rf"(\.tmp-([^/]*-)?){old_pid}", rf"\g<1>{pid}", path) for path in paths]
            calls = KINDS[fault.kind]
            inject = f"inject={calls}:error={fault.kind}:when={fault.number}"
            return [*(part for path in paths for part in ("-P", path)), "-e", f"trace={calls}", "-e", inject]

        _, outcome, seen = traced(arguments, log, options)
        return outcome, any("(INJECTED)" in line for line in seen)

    def faults(self) -> list[Fault]:
        """Every fault that can come, and file sizes that cut writes short."""
        found = [Fault(verb, SHORT, size) for verb in _VERBS for size in _sizes()]
        for verb, (lines, _, out) in self._traces.items():
            for kind, calls in KINDS.items():
                pattern = re.compile(rf"^\d+ +({calls.replace(',', '|')})\(.*{re.escape(str(out.parent))}/")
                count = sum(bool(pattern.match(line)) for line in lines)
                found += [Fault(verb, kind, number) for number in range(1, count + 1)]
        return found

    def intact(self, verb: str, out: Path, succeeded: bool) -> bool:
        """Whether what was there before is whole still, and nothing half done looks done."""
        if verb == "predict":
            return succeeded or not list(out.parent.iterdir())
        if succeeded:
            return True
        if verb == "shard":
            return not (out / "index.json").exists() or tree_without_scratch(out) == self._expected_store
        if (out / "run.json").is_file():
            try:
                verify(out)
            except ElmoStreamError:
                return False
        return verb == "train" or checkpoint_steps(out)[-1] >= checkpoint_steps(self._begun)[-1]

    def fails_after(self, verb: str, out: Path, succeeded: bool) -> bool:
        """Whether the command fails now, or gives something else than one without a fault."""
        if not succeeded:
            again = "resume" if (out / "run.json").is_file() else verb
            outcome = forked().run(*self._arguments(again, out), log=self.place.log)
            if outcome.code:
                return True
        if verb == "predict":
            found: object = out.read_bytes()
            whole: object = self._expected_lines
        elif verb == "shard":
            found, whole = tree(out), self._expected_store
        else:
            found, whole = result_of(out), self._expected_run
        shutil.rmtree(out.parent)
        return found != whole

    def _trace(self, verb: str) -> tuple[list[str], int, Path]:
        out = self.prepare(verb)
        calls = ",".join(sorted({call for kind in KINDS.values() for call in kind.split(",")}))
        options = ["-y", "-e", f"trace={calls}"]
        pid, outcome, lines = traced(self._arguments(verb, out), self.place.log, lambda _: options)
        must(outcome)
        return [line for line in lines if f"{out.parent}/" in line], pid, out


def tree_without_scratch(store: Path) -> dict[str, bytes]:
    """The content of a store whose scratch was not removed yet."""
    return {name: data for name, data in tree(store).items() if not name.startswith(".build/")}


def _sizes() -> list[int]:
    """Sizes from one byte to that of the largest file, ever further apart."""
    return sorted({int(1.22**power) for power in range(_SHORT_TRIES)})
