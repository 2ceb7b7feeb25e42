"""R2: the power fails after any call of writing a checkpoint, a store or predictions.

The calls are those that the real commands made; ``disk`` says what may be left of them. What was reported as done must
be there and whole; anything else must be whole, or not be taken for it.
"""

import os
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from elmo_stream.data.index import StoreIndex
from elmo_stream.errors import ElmoStreamError, UserError
from elmo_stream.training.checkpoint import load_checkpoint, prune_checkpoints, save_checkpoint
from tests.torture.children import forked
from tests.torture.disk import CALLS, LEFT, Disk
from tests.torture.tally import Tally
from tests.torture.tracing import require_strace, traced
from tests.torture.workplace import FORMATS, Workplace, must, tree

_STEPS = 5
_DONE = "done-"
_AGAIN = 60
"""One of so many cut conversions is run once more, to the end."""


def attack(tries: int, folder: Path, seed: int) -> Tally:
    """About ``tries`` power cuts: every call of all commands, with all that may be left, or a random part of them."""
    require_strace()
    rng, tally = random.Random(seed), Tally()
    place = Workplace(folder)
    must(place.go_on(folder / "run", FORMATS[0]))
    predict = ("predict", folder / "run", place.texts, "--out")
    must(forked().run(*predict, folder / "whole.jsonl", log=place.log))
    stores, lines = tree(place.store), (folder / "whole.jsonl").read_bytes()

    def again(out: Path) -> str:
        outcome = forked().run(*place.shard_arguments(out), log=place.log)
        return "" if outcome.code == 0 and tree(out) == stores else f"run again: {outcome}"

    here = "tests.torture.power_cuts:write_checkpoints"
    work: list[tuple[str, tuple[object, ...], str | None, Callable[[Path, int], str]]] = [
        ("run", (folder / "checkpoints" / "run",), here, _check_run),
        ("store", place.shard_arguments(folder / "conversion" / "store"), None, _StoreCheck(stores, again, rng)),
        ("out.jsonl", (*predict, folder / "prediction" / "out.jsonl"), None, _LinesCheck(lines)),
    ]
    traces = []
    for (name, arguments, call, check), home in zip(work, ("checkpoints", "conversion", "prediction"), strict=True):
        (folder / home).mkdir()
        options = ["-xx", "-s", str(1 << 26), "-e", f"trace={CALLS}"]
        _, outcome, trace = traced(arguments, place.log, lambda _, options=options: options, call=call)
        must(outcome)
        traces.append((name, folder / home, trace, check))
    share = tries / sum(len(LEFT) * sum(1 for _ in Disk(home).replay(trace)) for _, home, trace, _ in traces)
    for name, home, trace, check in traces:
        disk, done = Disk(home), 0
        for call in disk.replay(trace):
            if _DONE in call:
                done = int(call.rpartition(_DONE)[2])
            for what in LEFT:
                if rng.random() < share:
                    _cut(
                        tally,
                        f"{home.name} after {call}, {what}",
                        disk.left(what, rng),
                        folder / "cut",
                        name,
                        done,
                        check,
                    )
        for what in LEFT:  # the command has ended
            _cut(tally, f"{home.name}, {what}", disk.left(what, rng), folder / "cut", name, _STEPS, check)
    return tally


def _cut(
    tally: Tally,
    where: str,
    left: dict[str, bytes | None],
    folder: Path,
    name: str,
    done: int,
    check: Callable[[Path, int], str],
) -> None:
    folder.mkdir()
    for path, content in left.items():
        if content is None:
            (folder / path).mkdir()
        else:
            (folder / path).write_bytes(content)
    tally.tries += 1
    if wrong := check(folder / name, done):
        tally.lost += 1
        tally.notes.append(f"{where}, {done} done: {wrong}")
    shutil.rmtree(folder)


def write_checkpoints(run: str) -> None:
    """Write checkpoints as training does, and look for a file of a telling name after each."""
    for step in range(1, _STEPS + 1):
        generator = torch.Generator().manual_seed(step)
        save_checkpoint(
            Path(run),
            step,
            state={"total_steps": _STEPS},
            encoder={"weight": torch.randn(7, 33, generator=generator)},
            optimizer={"0.exp_avg": torch.randn(7, 33, generator=generator)},
            classifier=((at, at + 5, {"weight": torch.randn(5, 33, generator=generator)}) for at in (0, 5)),
        )
        os.path.exists(f"{run}/{_DONE}{step}")
        prune_checkpoints(Path(run), 1)
    sys.exit(0)


def _check_run(run: Path, done: int) -> str:
    warnings: list[str] = []
    try:
        checkpoint = load_checkpoint(run, report=warnings.append)
    except ElmoStreamError as error:
        return str(error)
    if (checkpoint.step if checkpoint else 0) < done or warnings:
        return f"found {checkpoint and checkpoint.step}; {warnings}"
    return ""


class _LinesCheck:
    def __init__(self, expected: bytes) -> None:
        self._expected = expected

    def __call__(self, out: Path, done: int) -> str:
        if out.exists():
            return "" if out.read_bytes() == self._expected else "half written"
        return "missing" if done else ""


class _StoreCheck:
    def __init__(self, expected: dict[str, bytes], again: Callable[[Path], str], rng: random.Random) -> None:
        self._expected, self._again, self._rng = expected, again, rng

    def __call__(self, out: Path, done: int) -> str:
        try:
            StoreIndex.load(out)
        except UserError:
            if done:
                return "missing"
            return self._again(out) if self._rng.random() < 1 / _AGAIN else ""
        except ElmoStreamError as error:
            return str(error)
        found = {name: data for name, data in tree(out).items() if not name.startswith(".build/")}
        return "" if found == self._expected else "not whole, though its index is there"
