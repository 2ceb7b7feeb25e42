"""R8: two commands in one folder do not mix, and a lock does not outlive its holder."""

import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

from tests.torture.children import Blow, forked
from tests.torture.tally import Tally
from tests.torture.workplace import FORMATS, Workplace, must, result_of, tree

_LOCKED = 75


def attack(tries: int, folder: Path, seed: int) -> Tally:
    """A try: a command is stopped where it works, another one comes, the first is killed, the other comes again."""
    rng, tally = random.Random(seed), Tally()
    place = Workplace(folder)
    must(place.go_on(folder / "whole", FORMATS[0]))
    expected_run, expected_store = result_of(folder / "whole"), tree(place.store)
    for number in range(tries):
        out = folder / f"contested-{number}"
        if number % 2:
            first = place.shard_arguments(out)
            where, rivals = Blow(signal.SIGSTOP, call=rng.randint(8, 60), below=str(out / ".build")), [first]
            differs: Callable[[], bool] = lambda out=out: tree(out) != expected_store  # noqa: E731
        else:
            first = place.train_arguments(out, FORMATS[0])
            where, rivals = Blow(signal.SIGSTOP, line=rng.randint(1, 3)), [first, ("resume", out)]
            differs = lambda out=out: result_of(out) != expected_run  # noqa: E731
        holder_log = folder / "holder.log"
        holder = forked().start(*first, log=holder_log, blow=where)
        forked().wait_until_stopped(holder)
        tally.tries += 1
        refused = [forked().run(*rival, log=place.log) for rival in rivals]
        forked().send(holder, signal.SIGKILL)
        forked().wait(holder, holder_log)
        after = forked().run(*rivals[-1], log=place.log)
        note = f"{out.name}, {where}: {[o.code for o in refused]}, then {after.code} {after.output}"
        traceback = any(outcome.traceback for outcome in (*refused, after))
        lost = any(outcome.code != _LOCKED for outcome in refused) or bool(after.code)
        if tally.judge(note, traceback=traceback, lost=lost, silent=differs):
            shutil.rmtree(out)
    return tally
