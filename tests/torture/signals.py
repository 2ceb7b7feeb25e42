"""R7: SIGTERM and SIGINT at any instant: saved, the right exit code, and nothing half written that is believed."""

import random
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path

from elmo_stream.training.checkpoint import checkpoint_steps
from tests.torture.kills import random_blow
from tests.torture.tally import Tally
from tests.torture.workplace import FORMATS, Workplace, must, result_of


def attack(tries: int, folder: Path, seed: int) -> Tally:
    """Every interrupted command is a try; a third of them gets the signal twice at once."""
    rng, tally = random.Random(seed), Tally()
    place = Workplace(folder)
    must(place.go_on(folder / "whole", FORMATS[1]))
    expected = result_of(folder / "whole")
    run, number = folder / "interrupted-0", 0
    while tally.tries < tries:
        which = rng.choice((signal.SIGTERM, signal.SIGINT))
        blow = replace(random_blow(rng, which, run), times=rng.choice((1, 1, 2)))
        outcome = place.go_on(run, FORMATS[1], blow)
        said = f"{run.name}, {blow}: exit {outcome.code}, {outcome.output[-400:]}"
        tally.tries += outcome.code != 0
        if outcome.traceback:
            tally.tracebacks += 1
            tally.notes.append(said)
        elif outcome.code not in (0, 128 + which, -which):
            tally.lost += 1
            tally.notes.append(said)
        elif (saved := re.search(r"at step ([\d,]+); saved", outcome.output)) is not None:
            if checkpoint_steps(run)[-1] != int(saved[1].replace(",", "")):
                tally.lost += 1
                tally.notes.append(said)
        elif outcome.code == 128 + which and _unsaved(outcome.output) and blow.times == 1:
            tally.lost += 1  # it was training, and yet it did not save
            tally.notes.append(said)
        if outcome.code and rng.random() < 0.5:
            continue  # the next one hits what is resumed
        outcome = place.go_on(run, FORMATS[1])
        if outcome.code or result_of(run) != expected:
            tally.silent += 1
            tally.notes.append(f"{run.name} ended otherwise: {outcome.code} {outcome.output[-400:]}")
        shutil.rmtree(run)
        number += 1
        run = folder / f"interrupted-{number}"
    return tally


def _unsaved(output: str) -> bool:
    """Whether a training had begun and ended without saying that it saved."""
    return "step 1/" in output and "saved" not in output
