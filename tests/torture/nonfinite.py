"""Numbers that are not finite end a training, which names the step; no checkpoint ever holds one."""

import random
import re
import shutil
from pathlib import Path

from safetensors.torch import load_file

from elmo_stream.config import load_config
from elmo_stream.errors import UserError
from elmo_stream.training.trainer import train
from tests.torture.materials import SMALL, make_store, quiet
from tests.torture.tally import Tally

_WAYS = (
    ["optimizer.classifier_lr=100.0", "classifier.loss=squared_hinge"],
    ["optimizer.encoder_lr=100.0", "encoder.hidden=32", "optimizer.classifier_lr=100.0"],
    ["classifier.init_std=1.0", "optimizer.classifier_lr=100.0", "classifier.loss=squared_hinge"],
)
_FORMATS = ("fp32", "bf16", "fp8")


def attack(tries: int, folder: Path, seed: int) -> Tally:
    """A try is a training whose rates let it diverge; it must be refused, or end with finite numbers."""
    tally, chance = Tally(), random.Random(seed)
    store = make_store(folder)
    for number in range(tries):
        keys = [
            *SMALL, *_WAYS[number // len(_FORMATS) % len(_WAYS)],
            f"classifier.format={_FORMATS[number % len(_FORMATS)]}", f"seed={chance.randrange(1000)}",
            "train.steps=400", "checkpoint.every_steps=7", "optimizer.warmup_steps=0", "optimizer.schedule=constant",
        ]  # fmt: skip
        _try(store, folder / "run", keys, tally)
        shutil.rmtree(folder / "run", ignore_errors=True)
    return tally


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
