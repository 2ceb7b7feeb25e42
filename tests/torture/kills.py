"""R1: training is killed with SIGKILL, again and again, and still ends in the bits of a run that nobody killed."""

import json
import random
import shutil
import signal
from functools import partial
from pathlib import Path
from typing import Any

from elmo_stream.training.checkpoint import checkpoint_steps
from tests.torture.children import Blow
from tests.torture.tally import Tally
from tests.torture.workplace import EVERY_STEPS, FORMATS, Workplace, must, result_of

_SECONDS, _CALLS, _LINES = 3.0, 150, 6


def random_blow(rng: random.Random, number: int, run: Path) -> Blow:
    """At a random time, before a random call in the run's folder or within its checkpoints, or after a line: at
    step 0, and at the edges of epochs.
    """
    kind = rng.choice(("seconds", "call", "checkpoint", "checkpoint", "line"))
    if kind == "seconds":
        return Blow(number, seconds=rng.uniform(0, _SECONDS))
    if kind == "line":
        return Blow(number, line=rng.randint(1, _LINES))
    return Blow(number, call=rng.randint(1, _CALLS), below=str(run / "checkpoints" if kind == "checkpoint" else run))


def attack(tries: int, folder: Path, seed: int) -> Tally:
    """Every kill is a try; runs are killed up to three times."""
    rng, tally = random.Random(seed), Tally()
    place = Workplace(folder)
    expected = {}
    for fmt in FORMATS:
        must(place.go_on(folder / fmt, fmt))
        expected[fmt] = result_of(folder / fmt)
    number = 0
    while tally.tries < tries:
        fmt, run = FORMATS[number % 2], folder / f"killed-{number}"
        number += 1
        for _ in range(rng.randint(1, 3)):
            outcome = place.go_on(run, fmt, random_blow(rng, signal.SIGKILL, run))
            if outcome.code != -signal.SIGKILL:
                break
            tally.tries += 1
        newest = max([0, *checkpoint_steps(run)])
        repeated = _reported_step(run) - newest
        outcome = place.go_on(run, fmt)
        left = [path.name for path in run.rglob("*.tmp-*")]
        note = f"{run.name} ({fmt}), from step {newest}, left {left}: {outcome.output[-400:]}"
        lost = bool(outcome.code or left or (newest and f"at step {newest:,}." not in outcome.output))
        silent = partial(_differs, run, expected[fmt], repeated)
        if tally.judge(note, traceback=outcome.traceback, lost=lost, silent=silent):
            shutil.rmtree(run)
    return tally


def _differs(run: Path, expected: dict[str, Any], repeated: int) -> bool:
    return result_of(run) != expected or repeated > EVERY_STEPS


def _reported_step(run: Path) -> int:
    """The last step that the run told of."""
    if not (run / "metrics.jsonl").is_file():
        return 0
    whole = [line for line in (run / "metrics.jsonl").read_text().splitlines(keepends=True) if line.endswith("\n")]
    return max([0, *(json.loads(line)["step"] for line in whole)])
