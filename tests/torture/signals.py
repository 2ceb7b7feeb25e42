"""R7: SIGTERM and SIGINT at any instant: saved, the right exit code, and nothing half written that is believed."""

import random
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path

from elmo_stream.training.checkpoint import checkpoint_steps
from tests.torture.children import Blow, Outcome
from tests.torture.kills import random_blow
from tests.torture.tally import Tally
from tests.torture.workplace import FORMATS, Workplace, must, result_of


def attack(tries: int, folder: Path, seed: int) -> Tally:
    """Every interrupted command is a try; a third of them gets the signal twice at once.

    The first four come while training is at its first step, once and twice, by each of the signals.
    """
    rng, tally = random.Random(seed), Tally()
    place = Workplace(folder)
    must(place.go_on(folder / "whole", FORMATS[1]))
    expected = result_of(folder / "whole")
    first_line = 1 + place.log.read_text().splitlines().index(_first_step(place.log))
    chosen = [(signal.SIGTERM, 1), (signal.SIGINT, 2), (signal.SIGINT, 1), (signal.SIGTERM, 2)]
    run, number = folder / "interrupted-0", 0
    while tally.tries < tries:
        if early := number < len(chosen):
            which, times = chosen[number]
            blow = Blow(which, line=first_line, times=times)
        else:
            which = rng.choice((signal.SIGTERM, signal.SIGINT))
            blow = replace(random_blow(rng, which, run), times=rng.choice((1, 1, 2)))
        outcome = place.go_on(run, FORMATS[1], blow)
        said = f"{run.name}, {blow}: exit {outcome.code}, {outcome.output[-400:]}"
        tally.tries += early or outcome.code != 0
        lost = _lost(outcome, blow, run)
        sound = tally.judge(said, traceback=outcome.traceback, lost=lost, silent=lambda: False)
        if sound and outcome.code and not early and rng.random() < 0.5:
            continue  # the next one hits what is resumed
        outcome = place.go_on(run, FORMATS[1])
        if outcome.code or result_of(run) != expected:
            tally.silent += 1
            tally.notes.append(f"{run.name} ended otherwise: {outcome.code} {outcome.output[-400:]}")
        shutil.rmtree(run)
        number += 1
        run = folder / f"interrupted-{number}"
    return tally


def _first_step(log: Path) -> str:
    return next(line for line in log.read_text().splitlines() if "step 1/" in line)


def _lost(outcome: Outcome, blow: Blow, run: Path) -> bool:
    """Whether a command ended otherwise than promised: with another code, too late, or without its checkpoint."""
    if outcome.code not in (0, 128 + blow.signal, -blow.signal):
        return True
    saved = re.search(r"at step ([\d,]+); saved", outcome.output)
    if saved is not None:
        at_once = blow.times > 1 and blow.seconds is None  # then the second signal comes within the same step
        step = int(saved[1].replace(",", ""))
        return at_once or outcome.code != 128 + blow.signal or checkpoint_steps(run)[-1] != step
    if outcome.code == 128 + blow.signal:
        return blow.times == 1 and "step 1/" in outcome.output  # it was training, and yet it did not save
    return outcome.code == 0 and _before_last_step(outcome, blow)


def _before_last_step(outcome: Outcome, blow: Blow) -> bool:
    """Whether the signal came with a line of the log that told of a step before the last."""
    if blow.line is None:
        return False
    told = [re.search(r"^step (\d+)/(\d+) ", line) for line in outcome.output.splitlines()[blow.line - 1 : blow.line]]
    return any(match is not None and match[1] != match[2] for match in told)
