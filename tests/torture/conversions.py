"""R13: a converter that is killed at random ends with the same bytes, and never does finished work again."""

import random
import shutil
import signal
from functools import partial
from pathlib import Path

from tests.torture.children import Blow, forked
from tests.torture.tally import Tally
from tests.torture.workplace import Workplace, must, tree

_SECONDS, _CALLS = 0.6, 250
_FINISHED = ("*/shard-?????", ".build/*-?????", "labels", "tokenizer")


def attack(tries: int, folder: Path, seed: int) -> Tally:
    """Every kill is a try; a store is killed up to six times before it may end. Every seventh has two workers."""
    rng, tally = random.Random(seed), Tally()
    place = Workplace(folder)
    expected = {}
    for kind in ("zarr", "webdataset"):
        must(forked().run(*place.shard_arguments(folder / kind, store=kind), log=place.log))
        expected[kind] = tree(folder / kind)
    number = 0
    while tally.tries < tries:
        kind, out = rng.choice(list(expected)), folder / f"killed-{number}"
        workers = 2 if number % 7 == 6 else 1
        number += 1
        arguments = place.shard_arguments(out, workers, kind)
        repeated: set[str] = set()
        for _ in range(rng.randint(1, 6)):
            before = _finished(out)
            blow = Blow(call=rng.randint(1, _CALLS), below=str(out))
            if workers > 1 or rng.random() < 0.3:
                blow = Blow(seconds=rng.uniform(0, _SECONDS * (5 if workers > 1 else 1)))
            if forked().run(*arguments, log=place.log, blow=blow).code != -signal.SIGKILL:
                break
            tally.tries += 1
            repeated |= _redone(before, _finished(out))
        before = _finished(out)
        outcome = forked().run(*arguments, log=place.log)
        if (out / "index.json").exists() and outcome.code == 2:
            outcome = forked().run("verify", out, log=place.log)  # the kill came after everything was done
        repeated |= _redone(before, _finished(out))
        note = f"{out.name} ({kind}): done again {sorted(repeated)}; {outcome.output[-400:]}"
        lost = bool(outcome.code or repeated)
        if tally.judge(note, traceback=outcome.traceback, lost=lost, silent=partial(_differs, out, expected[kind])):
            shutil.rmtree(out)
    return tally


def _differs(out: Path, expected: dict[str, bytes]) -> bool:
    return tree(out) != expected


def _finished(out: Path) -> dict[str, tuple[int, int]]:
    """Identity of every finished shard and part; one that is written again has another."""
    folders = [folder for pattern in _FINISHED for folder in out.glob(pattern) if ".tmp-" not in folder.name]
    return {str(each): (each.stat().st_ino, each.stat().st_mtime_ns) for each in folders}


def _redone(before: dict[str, tuple[int, int]], after: dict[str, tuple[int, int]]) -> set[str]:
    return {name for name, identity in before.items() if after.get(name, identity) != identity}
