"""Numbers that are not finite stop a training, which names the step, or cost what ``train.on_nonfinite`` says.

No checkpoint ever holds one.
"""

import itertools
import json
import random
import re
import shutil
from pathlib import Path

from safetensors.torch import load_file

from elmo_stream.config import load_config
from elmo_stream.data.shard import convert
from elmo_stream.errors import UserError
from elmo_stream.training.trainer import train
from tests.torture.materials import SMALL, make_store, quiet
from tests.torture.tally import Tally

_ABSURD_DATA = ["train.steps=40"]
_WAYS = (
    ["train.steps=400", "optimizer.classifier_lr=100.0", "classifier.loss=squared_hinge"],
    ["train.steps=400", "optimizer.encoder_lr=100.0", "encoder.hidden=32", "optimizer.classifier_lr=100.0"],
    ["train.steps=400", "classifier.init_std=1.0", "optimizer.classifier_lr=100.0", "classifier.loss=squared_hinge"],
    _ABSURD_DATA,
)
_FORMATS = ("fp32", "bf16", "fp8")
_CHOICES = ("stop", "skip", "rollback")


def attack(tries: int, folder: Path, seed: int) -> Tally:
    """A try is a training whose rates let it diverge, or whose data do; it must be refused, or end with finite numbers.

    Where the data are to blame and their steps are skipped it must end.
    """
    tally, chance = Tally(), random.Random(seed)
    texts, features = make_store(folder), _make_absurd_store(folder)
    attacks = list(itertools.product(_WAYS, _FORMATS, _CHOICES))
    chance.shuffle(attacks)
    for number in range(tries):
        way, fmt, choice = attacks[number % len(attacks)]
        keys = [
            *SMALL, *way, f"classifier.format={fmt}", f"train.on_nonfinite={choice}", f"seed={chance.randrange(1000)}",
            "checkpoint.every_steps=7", "optimizer.warmup_steps=0", "optimizer.schedule=constant",
        ]  # fmt: skip
        _try(features if way is _ABSURD_DATA else texts, folder / "run", keys, tally)
        if way is _ABSURD_DATA and choice == "skip" and not _skipped(folder / "run"):
            tally.lost += 1
            tally.notes.append(f"{keys}: did not end, or skipped nothing")
        shutil.rmtree(folder / "run", ignore_errors=True)
    return tally


def _make_absurd_store(folder: Path) -> Path:
    """A store of features, of which two instances have finite values whose sums are not finite."""
    lines, absurd = ["160 60 40"], (20, 70)
    for row in range(160):
        value = 3.3e38 if row in absurd else 1 + row / 100
        lines.append(f"{row % 40} " + " ".join(f"{feature}:{value}" for feature in range(row % 5, 60)))
    (folder / "absurd.txt").write_text("\n".join(lines) + "\n")
    out = folder / "store-absurd"
    convert([folder / "absurd.txt"], out, format="xc-bow", tokenizer="bow", workers=1, report=quiet)
    return out


def _skipped(run: Path) -> int:
    """Steps that a training left out by its last line of metrics, 0 where it did not end."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return max((row.get("skipped", 0) for row in rows if rows[-1]["step"] == 40), default=0)


def _try(store: Path, out: Path, keys: list[str], tally: Tally) -> None:
    tally.tries += 1
    said = ""
    try:
        train(store, out, load_config(None, keys), report=quiet)
    except UserError as error:
        said = str(error)
        if not re.match(r"step \d+: the training diverged", said):
            tally.lost += 1
            tally.notes.append(f"{keys}: {said}")
    except Exception as error:
        tally.tracebacks += 1
        tally.notes.append(f"{keys}: {type(error).__name__}: {error}")
    for path in sorted(out.rglob("*.safetensors")):
        for name, tensor in load_file(path).items():
            if tensor.is_floating_point() and not tensor.float().isfinite().all():
                tally.silent += 1
                tally.notes.append(f"{keys}: {path.relative_to(out)} holds a {name} that is not finite; said {said!r}")
                return
