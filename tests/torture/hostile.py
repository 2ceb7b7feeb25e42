"""Hostile artefacts: files made to execute code, to write elsewhere, or to fill the memory. Each must be refused."""

import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from elmo_stream.data.index import StoreIndex
from elmo_stream.files import read_json, write_sealed_json
from tests.data.shards import forged
from tests.torture.materials import make_run, make_store
from tests.torture.memory import MOST_BYTES, grown_bytes
from tests.torture.refusal import expect_refusal
from tests.torture.tally import Tally


class Payload:
    """Pickled, it makes the file ``canary`` when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self._canary = canary

    def __reduce__(self) -> tuple[object, ...]:
        return (open, (str(self._canary), "w"))


@dataclass(frozen=True)
class Box:
    """Where an artefact is made: an empty folder, the place that must stay empty, whole stores and a run to spoil."""

    path: Path
    outside: Path
    stores: dict[str, Path]
    whole_run: Path

    @property
    def canary(self) -> Path:
        """Appears where code is executed."""
        return self.outside / "canary"

    @property
    def payload(self) -> Payload:
        """What executes code when it is unpickled."""
        return Payload(self.canary)

    @property
    def code(self) -> str:
        """Python that makes the canary."""
        return f"open({str(self.canary)!r}, 'w')\n"

    def store(self, backend: str = "zarr") -> Path:
        """A copy of a store."""
        return shutil.copytree(self.stores[backend], self.path / "store")

    def run(self) -> Path:
        """A copy of a run with its checkpoints."""
        return shutil.copytree(self.whole_run, self.path / "run")

    def forge_shard_file(self, store: Path, name: str, change: Callable[[bytes], bytes]) -> None:
        """Exchange a file of the first training shard, with an index that agrees."""
        index = StoreIndex.load(store)
        train = index.splits["train"]
        path = store / "train" / train.shards[0].name / name
        content = change(path.read_bytes())
        path.write_bytes(content)
        shards = (forged(train.shards[0], name, content), *train.shards[1:])
        replace(index, splits=index.splits | {"train": replace(train, shards=shards)}).save(store)

    def forge_checkpoint(self, run: Path, name: str, content: bytes) -> None:
        """Exchange a file of the newest checkpoint, with a manifest that agrees."""
        folder = run / "checkpoints" / "step-00000004"
        (folder / name).write_bytes(content)
        files = read_json(folder / "manifest.json")["files"]
        self.forge_json(folder / "manifest.json", files=files | {name: _entry(content)})

    def forge_run_file(self, run: Path, name: str, content: bytes) -> None:
        """Exchange a file that was laid down with a run, with a description that agrees."""
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_bytes(content)
        files = read_json(run / "run.json")["files"]
        self.forge_json(run / "run.json", files=files | {name: _entry(content)})

    @staticmethod
    def forge_json(path: Path, **change: object) -> None:
        """Change keys of a file that holds its own checksum, which then agrees."""
        body = {**read_json(path), **change}
        body.pop("sha256", None)
        write_sealed_json(path, body)


def _entry(content: bytes) -> dict[str, object]:
    from hashlib import sha256

    return {"bytes": len(content), "sha256": sha256(content).hexdigest()}


Hostile = Callable[[Box], tuple[Callable[[], object], str]]
"""Makes an artefact in a box; returns who reads it, and a word of the refusal."""


def attack(tries: int, folder: Path, seed: int) -> Tally:
    """Each artefact at least once; a try is one artefact read."""
    from tests.torture.hostile_inputs import INPUTS
    from tests.torture.hostile_stores import STORES

    os.environ["HF_HUB_OFFLINE"] = "1"
    stores = {backend: make_store(folder, backend) for backend in ("zarr", "webdataset")}
    run = make_run(stores["zarr"], folder / "whole-run", "encoder.hidden=16")
    artefacts = {**INPUTS, **STORES}
    names = random.Random(seed).sample(sorted(artefacts), k=len(artefacts))
    tally = Tally()
    for number in range(max(tries, len(names))):
        name = names[number % len(names)]
        box = Box(folder / "box" / "inner", folder / "box" / "outside", stores, run)
        box.path.mkdir(parents=True), box.outside.mkdir()
        _try(name, artefacts[name], box, tally)
        shutil.rmtree(folder / "box")
    return tally


def _try(name: str, make: Hostile, box: Box, tally: Tally) -> None:
    call, word = make(box)
    before = _entries(box)
    with grown_bytes() as grown:
        expect_refusal(tally, name, call, word)
    if grown() > MOST_BYTES:
        tally.lost += 1
        tally.notes.append(f"{name}: took {grown() >> 20} MiB")
    if list(box.outside.iterdir()) or _entries(box) != before:
        tally.lost += 1
        tally.notes.append(f"{name}: something was executed, or written outside")


def _entries(box: Box) -> set[Path]:
    """What lies beside the box, where nothing may appear."""
    return {*box.path.parent.iterdir(), *box.path.parent.parent.iterdir()}
