"""R13: a converter that is killed at random ends with the same bytes, and never does finished work again."""

import random
import shutil
import signal
from functools import partial
from pathlib import Path

from tests.torture.children import Blow, forked
from tests.torture.tally import Tally
from tests.torture.workplace import Workplace, must, tree

_SECONDS = 0.6
_CALLS = {"": 1000, ".build.tmp-": 8, ".build": 300, "train": 600, "test": 60}  # below each, of some 1,000 in all
# Where the first kills of all come: before there is a plan; while the last shard is written, when there is most that
# may not be made again; before the index; and when the scratch is removed.
_FIRST = ((".build.tmp-", 1, 8), ("test", 1, 60), ("test", 1, 20), ("index.json", 1, 1), (".build", 8, 20))
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
        first: dict[str, tuple[int, int]] = {}
        repeated: set[str] = set()
        for kill in range(rng.randint(1, 6) if number > 1 else len(_FIRST)):
            below, most = rng.choice(list(_CALLS.items()))
            below, least, most = _FIRST[kill] if number == 1 else (below, 1, most)
            blow = Blow(call=rng.randint(least, most), below=str(out / below))
            if workers > 1 or (number > 1 and rng.random() < 0.3):
                blow = Blow(seconds=rng.uniform(0, _SECONDS * (5 if workers > 1 else 1)))
            if forked().run(*arguments, log=place.log, blow=blow).code != -signal.SIGKILL:
                break
            tally.tries += 1
            repeated |= _redone(first, out)
        outcome = forked().run(*arguments, log=place.log)
        if (out / "index.json").exists() and outcome.code == 2:
            outcome = forked().run("verify", out, log=place.log)  # the kill came after everything was done
        repeated |= _redone(first, out)
        note = f"{out.name} ({kind}): done again {sorted(repeated)}; {outcome.output[-400:]}"
        lost = bool(outcome.code or repeated)
        if tally.judge(note, traceback=outcome.traceback, lost=lost, silent=partial(_differs, out, expected[kind])):
            shutil.rmtree(out)
    return tally


def _differs(out: Path, expected: dict[str, bytes]) -> bool:
    return tree(out) != expected


def _redone(first: dict[str, tuple[int, int]], out: Path) -> set[str]:
    """Finished shards and parts that are others than at first, by inode and time; ``first`` learns new ones."""
    removing = (out / "index.json").exists()  # the scratch, which is half there then
    patterns = [pattern for pattern in _FINISHED if not (removing and pattern.startswith(".build"))]
    folders = [folder for pattern in patterns for folder in out.glob(pattern) if ".tmp-" not in folder.name]
    found = {str(each): (each.stat().st_ino, each.stat().st_mtime_ns) for each in folders}
    return {name for name, identity in found.items() if first.setdefault(name, identity) != identity}
