"""Bit rot: one bit of one file is flipped; whoever reads the file must notice, and name it."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from elmo_stream.data.embeddings import EmbeddingPart
from elmo_stream.data.filters import load_filter
from elmo_stream.data.index import StoreIndex
from elmo_stream.data.rows import SplitRows
from elmo_stream.data.store import open_store
from elmo_stream.inspection import verify
from elmo_stream.model.chunk_layout import aligned_memory
from elmo_stream.model.scratch import ScratchFiles
from elmo_stream.training.checkpoint import load_checkpoint
from elmo_stream.training.run import open_run
from tests.torture.materials import make_run, make_store
from tests.torture.refusal import expect_refusal
from tests.torture.tally import Tally

_LOGS = ("metrics.jsonl", "tensorboard")
_CHUNK_BYTES = 3 * 4096
_CHUNKS = 3


@dataclass(frozen=True)
class Target:
    """A file that can rot, its name below its root, and who reads it."""

    path: Path
    name: str
    readers: tuple[Callable[[], object], ...]


def attack(tries: int, folder: Path, seed: int) -> Tally:
    """Flips a bit of stores in both backends, a run with its checkpoints and embeddings, and chunks on disk."""
    tally, chance = Tally(), random.Random(seed)
    scratch = ScratchFiles(folder / "scratch")
    try:
        groups = _targets(folder, scratch, chance)
        for number in range(tries):
            target = chance.choice(groups[number % len(groups)])
            _flip(target, chance, tally)
    finally:
        scratch.close()
    return tally


def _flip(target: Target, chance: random.Random, tally: Tally) -> None:
    at, bit = chance.randrange(target.path.stat().st_size), chance.randrange(8)
    what = f"{target.name}, byte {at}, bit {bit}"
    words = [part for part in Path(target.name).parts if part.startswith(("shard-", "step-"))]
    with open(target.path, "r+b", buffering=0) as stream:
        before = stream.read()[at]
        stream.seek(at)
        stream.write(bytes([before ^ 1 << bit]))
        counted = Tally()
        for reader in target.readers:
            expect_refusal(counted, what, reader, target.path.name, *words)
        if "checkpoints/step-00000004" in target.name:
            _expect_older(target.path, counted, what)
        stream.seek(at)
        stream.write(bytes([before]))
    tally.tries += 1
    tally.tracebacks += bool(counted.tracebacks)
    tally.silent += bool(counted.silent and not counted.tracebacks)
    tally.lost += bool(counted.lost and not counted.silent and not counted.tracebacks)
    tally.notes += counted.notes


def _expect_older(path: Path, tally: Tally, what: str) -> None:
    """A damaged newest checkpoint gives way to the one before, with a warning that names the file."""
    run = next(parent for parent in path.parents if (parent / "run.json").is_file())
    heard: list[str] = []
    checkpoint = load_checkpoint(run, report=heard.append)
    if checkpoint is None or checkpoint.step != 2 or len(heard) != 1 or path.name not in heard[0]:
        tally.lost += 1
        tally.notes.append(f"{what}: the checkpoint before was not taken with a warning ({heard})")


def _targets(folder: Path, scratch: ScratchFiles, chance: random.Random) -> list[list[Target]]:
    stores = [make_store(folder, backend) for backend in ("zarr", "webdataset")]
    run = make_run(stores[0], folder / "run", "encoder.frozen=true", "encoder.hidden=16")
    groups = [[_of_store(store, path) for path in _files(store)] for store in stores]
    of_run = [_of_run(run, stores[0], path) for path in _files(run)]
    groups.append([target for target in of_run if "checkpoints/" in target.name])
    groups.append([target for target in of_run if "checkpoints/" not in target.name])
    groups.append([_of_scratch(scratch, number, chance) for number in range(_CHUNKS)])
    return groups


def _files(root: Path) -> list[Path]:
    found = sorted(path for path in root.rglob("*") if path.is_file() and path.stat().st_size)
    return [path for path in found if path.relative_to(root).parts[0] not in _LOGS]


def _of_store(store: Path, path: Path) -> Target:
    name = path.relative_to(store)
    readers: list[Callable[[], object]] = [lambda: verify(store)]
    index = StoreIndex.load(store)
    if name.parts[0] in index.splits:
        entry = next(shard for shard in index.splits[name.parts[0]].shards if shard.name == name.parts[1])
        readers.append(lambda: open_store(store).read_shard(name.parts[0], entry))
    elif name.parts[0] == "filters":
        readers.append(lambda: load_filter(store, index, "test"))
    elif name.name == "index.json":
        readers.append(lambda: open_store(store))
    return Target(path, name.as_posix(), tuple(readers))


def _of_run(run: Path, store: Path, path: Path) -> Target:
    name = path.relative_to(run)
    readers: list[Callable[[], object]] = [lambda: verify(run)]
    if name.parts[0] == "checkpoints":
        readers.append(lambda: verify(path.parents[len(name.parts) - 3]))
        if name.parts[1] == "step-00000004":
            readers.append(lambda: load_checkpoint(run, strict=True))
    elif name.parts[0] == "embeddings":
        rows = SplitRows(store, StoreIndex.load(store), "train", 160)
        readers.append(lambda: EmbeddingPart(path.parent, rows, 16).take(np.arange(160)))
    else:
        readers.append(lambda: open_run(run))
    return Target(path, name.as_posix(), tuple(readers))


def _of_scratch(scratch: ScratchFiles, number: int, chance: random.Random) -> Target:
    memory = aligned_memory(_CHUNK_BYTES, torch.device("cpu"))
    memory.copy_(torch.frombuffer(bytearray(chance.randbytes(_CHUNK_BYTES)), dtype=torch.uint8))
    scratch.create(number, _CHUNK_BYTES)
    scratch.write(number, memory)
    (path,) = scratch.folder.glob(f"*{number}")
    return Target(path, f"scratch/{path.name}", (lambda: scratch.read_into(number, memory),))
