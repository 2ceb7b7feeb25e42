"""Hostile stores, runs and checkpoints, whose checksums all agree; see ``hostile``."""

import io
import json
import pickle
import shutil
import struct
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from elmo_stream.config import load_config
from elmo_stream.data.embeddings import EmbeddingPart
from elmo_stream.data.filters import load_filter
from elmo_stream.data.index import StoreIndex
from elmo_stream.data.labels import LabelNames
from elmo_stream.data.rows import SplitRows
from elmo_stream.data.store import open_store
from elmo_stream.files import file_entry, read_json
from elmo_stream.inspection import verify
from elmo_stream.training.models import trained_model
from elmo_stream.training.run import device_of_run, open_run
from elmo_stream.training.trainer import resume, train
from tests.torture.hostile import Box, Hostile
from tests.torture.materials import SMALL, quiet

STORES: dict[str, Hostile] = {}
Reader = tuple[Callable[[], object], str]


def _read_first(store: Path) -> Callable[[], object]:
    def read() -> None:
        shards = open_store(store)
        shards.read_shard("train", StoreIndex.load(store).splits["train"].shards[0])

    return read


# Tars: the first member is exchanged for one that tarfile would extract to another place, or unpickle.


def _tar(box: Box, **header: Any) -> Reader:
    def change(content: bytes) -> bytes:
        size = int(content[124:135], 8)
        member = tarfile.TarInfo("00000.token_offsets.npy")
        member.size = size
        for key, value in header.items():
            setattr(member, key, value)
        return member.tobuf(tarfile.GNU_FORMAT)[:512] + content[512:]

    store = box.store("webdataset")
    box.forge_shard_file(store, "blocks.tar", change)
    return _read_first(store), "blocks.tar"


_MEMBERS: dict[str, dict[str, Any]] = {
    "tar: a member that leads out": {"name": "../../../outside/escaped.npy"},
    "tar: a symbolic link": {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"},
    "tar: a hard link": {"type": tarfile.LNKTYPE, "linkname": "../../../index.json"},
    "tar: a device": {"type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 3},
    "tar: a pipe": {"type": tarfile.FIFOTYPE},
    "tar: a member that readers unpickle": {"name": "00000.token_offsets.pyd"},
    "tar: a member of eight GiB": {"size": (8 << 30) - 1},
    "tar: a member of an exabyte": {"size": 1 << 60},
}
STORES.update({name: lambda box, header=header: _tar(box, **header) for name, header in _MEMBERS.items()})


def _absolute(box: Box) -> Reader:
    return _tar(box, name=f"{box.outside}/absolute.npy"[-99:])


def _twice(box: Box) -> Reader:
    store = box.store("webdataset")
    box.forge_shard_file(store, "blocks.tar", lambda content: content[:2048] + content)
    return _read_first(store), "blocks.tar"


def _pickled_member(box: Box) -> Reader:
    store = box.store("webdataset")
    payload = pickle.dumps(box.payload)
    box.forge_shard_file(
        store, "blocks.tar", lambda content: content[:512] + payload + content[512 + len(payload) :]
    )  # fmt: skip
    return _read_first(store), "blocks.tar"


STORES |= {
    "tar: an absolute name": _absolute,
    "tar: the same members twice": _twice,
    "tar: a pickle for an array": _pickled_member,
}


# Zarr: metadata that claim other arrays than the index, or codecs that execute.


def _zarr(box: Box, **change: Any) -> Reader:
    store = box.store()

    def changed(content: bytes) -> bytes:
        return json.dumps({**json.loads(content), **change}).encode()

    box.forge_shard_file(store, "tokens/zarr.json", changed)
    return _read_first(store), "shard-00000"


def _frame(box: Box) -> Reader:
    store = box.store()
    frame = b"\x28\xb5\x2f\xfd" + bytes([0b11100000]) + struct.pack("<Q", 1 << 60)
    box.forge_shard_file(store, "tokens/c/0", lambda content: frame + content[len(frame) :])
    return _read_first(store), "tokens"


_GRID = {"name": "regular", "configuration": {"chunk_shape": [1 << 50]}}
_METADATA: dict[str, dict[str, Any]] = {
    "zarr: a shape beyond all memory": {"shape": [1 << 50]},
    "zarr: a chunk beyond all memory": {"chunk_grid": _GRID},
    "zarr: both": {"shape": [1 << 50], "chunk_grid": _GRID},
    "zarr: values that are objects": {"data_type": "object"},
    "zarr: a codec that unpickles": {"codecs": [{"name": "numcodecs.pickle", "configuration": {"protocol": 5}}]},
    "zarr: values of variable length": {"data_type": "variable_length_bytes", "codecs": [{"name": "vlen-bytes"}]},
    "zarr: a negative shape": {"shape": [-1]},
}
STORES.update({name: lambda box, change=change: _zarr(box, **change) for name, change in _METADATA.items()})
STORES["zarr: a frame that claims an exabyte"] = _frame


# The index and the files beside the shards.


def _index(box: Box, change: Callable[[StoreIndex], StoreIndex], word: str = "index.json") -> Reader:
    store = box.store()
    change(StoreIndex.load(store)).save(store)
    return _read_first(store), word


def _train_split(index: StoreIndex, **change: Any) -> StoreIndex:
    """The first shard changed, and the totals with it."""
    train = index.splits["train"]
    first = replace(train.shards[0], **change)
    shards = (first, *train.shards[1:])
    sums = {key: sum(getattr(shard, key) for shard in shards) for key in ("rows", "tokens", "positives")}
    split = replace(train, shards=shards, instances=sums["rows"], tokens=sums["tokens"], positives=sums["positives"])
    return replace(index, splits=index.splits | {"train": split})


def _labels_file(box: Box, name: str, content: bytes) -> Path:
    store = box.store()
    (store / "labels" / name).write_bytes(content)
    index = StoreIndex.load(store)
    files = index.labels.files | {name: file_entry(store / "labels" / name)}
    replace(index, labels=replace(index.labels, files=files)).save(store)
    return store


def _npy(shape: str, descr: str = "<i8") -> bytes:
    header = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}".encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header


def _pickled_array(box: Box) -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.array([box.payload, None], dtype=object), allow_pickle=True)
    return stream.getvalue()


def _names(store: Path) -> Callable[[], object]:
    return lambda: LabelNames(store / "labels")[[0, 1, 2]]


def _filter(box: Box, content: bytes) -> Reader:
    store = box.store()
    path = store / "filters" / "test.npy"
    path.write_bytes(content)
    index = replace(StoreIndex.load(store), filters={"test.npy": file_entry(path)})
    index.save(store)
    return lambda: load_filter(store, index, "test"), "test.npy"


def _many_labels(box: Box) -> Reader:
    store = box.store()
    index = StoreIndex.load(store)
    replace(index, labels=replace(index.labels, count=2**32 - 3)).save(store)
    return lambda: train(store, box.path / "run", load_config(None, SMALL), report=quiet), "index.json"


def _names_offsets(box: Box) -> Reader:
    store = box.store()
    offsets = np.load(store / "labels" / "offsets.npy")
    offsets[1:-1] = np.iinfo(np.int64).max
    stream = io.BytesIO()
    np.save(stream, offsets)
    (store / "labels" / "offsets.npy").write_bytes(stream.getvalue())
    return _names(store), "names.bin"


_FILES = {"../../outside/escaped": {"bytes": 1, "sha256": "0" * 64}}
STORES |= {
    "index: a shard of a quadrillion rows": lambda box: _index(
        box, lambda index: _train_split(index, rows=10**15), "shard-00000"
    ),
    "index: a shard of an exabyte of tokens": lambda box: _index(
        box, lambda index: _train_split(index, tokens=1 << 60), "shard-00000"
    ),
    "index: a shard that lies elsewhere": lambda box: _index(
        box, lambda index: _train_split(index, name="../../outside")
    ),
    "index: a file that lies elsewhere": lambda box: _index(box, lambda index: _train_split(index, files=_FILES)),
    "index: an absolute file": lambda box: _index(
        box, lambda index: _train_split(index, files={"/etc/passwd": _FILES["../../outside/escaped"]})
    ),
    "index: four billion labels": _many_labels,
    "index: nesting beyond the stack": lambda box: _written(box, "index.json", b"[" * 5_000_000),
    "labels: offsets that are pickled objects": lambda box: (
        _names(_labels_file(box, "offsets.npy", _pickled_array(box))), "offsets.npy"
    ),
    "labels: a file that claims a quadrillion labels": lambda box: (
        _names(_labels_file(box, "offsets.npy", _npy(f"({10**15},)"))), "offsets.npy"
    ),
    "labels: a file that claims a negative size": lambda box: (
        _names(_labels_file(box, "frequency.npy", _npy("(-5,)", "<u4"))), "frequency.npy"
    ),
    "labels: offsets that point elsewhere": _names_offsets,
    "filter: pairs that are pickled objects": lambda box: _filter(box, _pickled_array(box)),
    "filter: pairs that claim all memory": lambda box: _filter(box, _npy(f"({1 << 50}, 2)")),
}  # fmt: skip


def _written(box: Box, name: str, content: bytes) -> Reader:
    store = box.store()
    (store / name).write_bytes(content)
    return lambda: verify(store), name


# Runs and checkpoints.

_CHUNK = "classifier/chunk-00000.safetensors"


def _model(run: Path) -> Callable[[], object]:
    return lambda: trained_model(open_run(run), 4, device_of_run(), quiet)


def _resume(box: Box, run: Path) -> Callable[[], object]:
    """Training goes on for a step more than it had, so that all of the checkpoint is read."""
    folder = run / "checkpoints" / "step-00000004"
    body = {**read_json(folder / "state.json"), "total_steps": 5}
    box.forge_checkpoint(run, "state.json", json.dumps(body).encode())
    return lambda: resume(run, report=quiet)


def _checkpoint_file(box: Box, name: str, content: bytes) -> Reader:
    run = box.run()
    box.forge_checkpoint(run, name, content)
    return (_resume(box, run) if name.startswith("optimizer") else _model(run)), Path(name).name


def _pickle(box: Box) -> bytes:
    return pickle.dumps({"weight": box.payload})


def _safetensors(header: dict[str, Any] | str, data: bytes = b"") -> bytes:
    text = header if isinstance(header, str) else json.dumps(header)
    return struct.pack("<Q", len(text)) + text.encode() + data


_HUGE = {"weight": {"dtype": "U8", "shape": [1 << 40, 1 << 20], "data_offsets": [0, 1 << 60]}}
_WIDE = {"weight": {"dtype": "U8", "shape": [1 << 62, 4], "data_offsets": [0, 0]}}
_ONE = '"weight":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'
_DOUBLE = f"{{{_ONE},{_ONE}}}"
for _name in ("encoder.safetensors", "optimizer.safetensors", _CHUNK):
    STORES |= {
        f"checkpoint: a pickle for {_name}": lambda box, name=_name: _checkpoint_file(box, name, _pickle(box)),
        f"checkpoint: a header of an exabyte in {_name}": lambda box, name=_name: _checkpoint_file(
            box, name, struct.pack("<Q", 1 << 60) + b"{}"
        ),
        f"checkpoint: a tensor of an exabyte in {_name}": lambda box, name=_name: _checkpoint_file(
            box, name, _safetensors(_HUGE)
        ),
        f"checkpoint: a shape that overflows in {_name}": lambda box, name=_name: _checkpoint_file(
            box, name, _safetensors(_WIDE)
        ),
        f"checkpoint: a tensor twice in {_name}": lambda box, name=_name: (
            _checkpoint_file(box, name, _safetensors(_DOUBLE, b"x"))[0],
            "step-00000004",
        ),
    }


def _manifest(box: Box, name: str) -> Reader:
    run = box.run()
    path = run / "checkpoints" / "step-00000004" / "manifest.json"
    files = read_json(path)["files"] | {name: {"bytes": 1, "sha256": "0" * 64}}
    box.forge_json(path, files=files)
    return _model(run), "manifest.json"


def _state(box: Box, **change: Any) -> Reader:
    run = box.run()
    state = read_json(run / "checkpoints" / "step-00000004" / "state.json")
    box.forge_checkpoint(run, "state.json", json.dumps({**state, **change}).encode())
    return _model(run), "step-00000004"


def _chunk_state(box: Box, **change: Any) -> Reader:
    return _state(box, chunks=[{"file": _CHUNK, "first_label": 0, "last_label": 40, **change}])


def _run_info(box: Box, **change: Any) -> Reader:
    run = box.run()
    box.forge_json(run / "run.json", **change)
    return _model(run), "run.json"


def _run_config(box: Box) -> Reader:
    run = box.run()
    box.forge_run_file(run, "config.toml", b'[encoder]\nkind = "transformer"\nname = "x"\n')
    folder = run / "encoder"
    auto_map = {"AutoModel": "modeling_evil.Evil", "AutoConfig": "modeling_evil.Evil"}
    box.forge_run_file(run, "encoder/config.json", json.dumps({"model_type": "evil", "auto_map": auto_map}).encode())
    (folder / "modeling_evil.py").write_text(box.code)
    return _model(run), "config.json"


def _embeddings(box: Box) -> Reader:
    store, part = box.store(), box.path / "part"
    part.mkdir()
    (box.path / "secret.bf16").write_bytes(bytes(32))
    body = {
        "format": "elmo-stream-embeddings", "version": 2, "dim": 16, "rows": [64, 64, 32],
        "files": {"../secret.bf16": file_entry(box.path / "secret.bf16")},
    }  # fmt: skip
    (part / "index.json").write_text(json.dumps(body))
    box.forge_json(part / "index.json")
    rows = SplitRows(store, StoreIndex.load(store), "train", 160)
    return lambda: EmbeddingPart(part, rows, 16), "index.json"


def _linked(box: Box) -> Reader:
    """A checkpoint whose folder is a link to another place, left half-written there."""
    run = box.run()
    folder = run / "checkpoints" / "step-00000004"
    shutil.rmtree(folder)
    folder.symlink_to("/etc")
    return _model(run), "manifest.json"


STORES |= {
    "checkpoint: a manifest that names a file outside": lambda box: _manifest(box, "../../../../outside/escaped"),
    "checkpoint: a manifest that names an absolute file": lambda box: _manifest(box, "/etc/passwd"),
    "checkpoint: labels without end": lambda box: _chunk_state(box, first_label=10**17, last_label=10**18),
    "checkpoint: labels below zero": lambda box: _chunk_state(box, first_label=-(10**18)),
    "checkpoint: a chunk outside": lambda box: _chunk_state(box, file="../../../../outside/escaped"),
    "checkpoint: a step that is a text": lambda box: _state(box, step="__import__('os')"),
    "checkpoint: a link to another place": _linked,
    "run: a quadrillion labels": lambda box: _run_info(box, labels=10**15),
    "run: a vocabulary beyond all memory": lambda box: _run_info(box, vocab_size=10**12),
    "run: a file outside": lambda box: _run_info(box, files=_FILES),
    "run: a longest text beyond all": lambda box: _run_info(box, max_length=1 << 40),
    "run: an encoder of its own code": _run_config,
    "embeddings: a file outside": _embeddings,
}
