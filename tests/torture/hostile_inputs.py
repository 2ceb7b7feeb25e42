"""Hostile input files, configurations, encoders and tokenizers; see ``hostile``."""

import gzip
import io
import json
import lzma
import os
import pickle
import struct
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import scipy.sparse
import torch
import zstandard

from elmo_stream.config import EncoderConfig, load_config
from elmo_stream.data.readers.detect import open_source
from elmo_stream.data.shard import convert
from elmo_stream.model.encoder import create_encoder
from tests.torture.hostile import Box, Hostile
from tests.torture.materials import quiet

INPUTS: dict[str, Hostile] = {}
_MATRIX = scipy.sparse.csr_matrix(np.array([[0, 0.5, 0], [2, 0, -1]], dtype=np.float32))
_LINE = b'{"text": "a line", "labels": ["one"]}\n'


def _hostile(name: str) -> Callable[[Hostile], Hostile]:
    def add(make: Hostile) -> Hostile:
        INPUTS[name] = make
        return make

    return add


def _convert(box: Box, name: str, content: bytes, **options: object) -> Callable[[], object]:
    path = box.path / name
    path.write_bytes(content)
    arguments = {"tokenizer": None, "workers": 1, "report": quiet} | options
    return lambda: convert([path], box.path / "new-store", **arguments)


def _npz(box: Box, members: dict[str, bytes], word: str) -> tuple[Callable[[], object], str]:
    """A matrix as scipy writes it, with some members exchanged or added."""
    stream = io.BytesIO()
    scipy.sparse.save_npz(stream, _MATRIX)
    whole = zipfile.ZipFile(stream)
    written = {name: whole.read(name) for name in whole.namelist()} | members
    (box.path / "Y.trn.npz").write_bytes(stream.getvalue())
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in written.items():
            archive.writestr(name, content)
    return _convert(box, "X.trn.npz", packed.getvalue()), word


def _object_array(box: Box, shape: tuple[int, ...]) -> bytes:
    stream = io.BytesIO()
    values = np.empty(shape, dtype=object)
    values[...] = box.payload
    np.save(stream, values, allow_pickle=True)
    return stream.getvalue()


@_hostile("npz: values are pickled objects")
def _(box: Box) -> tuple[Callable[[], object], str]:
    return _npz(box, {"data.npy": _object_array(box, (3,))}, "array 'data'")


@_hostile("npz: the format is a pickled object")
def _(box: Box) -> tuple[Callable[[], object], str]:
    return _npz(box, {"format.npy": _object_array(box, ())}, "array 'format'")


@_hostile("npz: a member that is a bare pickle")
def _(box: Box) -> tuple[Callable[[], object], str]:
    return _npz(box, {"indptr.npy": pickle.dumps(box.payload)}, "array 'indptr'")


@_hostile("npz: a member that leads out of its folder")
def _(box: Box) -> tuple[Callable[[], object], str]:
    return _npz(box, {"../../outside/escaped.npy": b"x"}, "outside/escaped.npy")


@_hostile("npz: a member with an absolute name")
def _(box: Box) -> tuple[Callable[[], object], str]:
    return _npz(box, {f"{box.outside}/absolute.npy": b"x"}, "absolute.npy")


@_hostile("npz: an array that claims a shape beyond all memory")
def _(box: Box) -> tuple[Callable[[], object], str]:
    header = b"{'descr': '<i4', 'fortran_order': False, 'shape': (1125899906842624,), }".ljust(117) + b"\n"
    return _npz(box, {"indices.npy": b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header}, "'indices'")


@_hostile("npz: a member that claims to unpack to four GiB")
def _(box: Box) -> tuple[Callable[[], object], str]:
    call, _ = _npz(box, {}, "")
    path = box.path / "X.trn.npz"
    content = bytearray(path.read_bytes())
    struct.pack_into("<I", content, content.index(b"PK\x01\x02") + 24, 0xFFFFFFF0)
    path.write_bytes(content)
    return call, "times its size"


@_hostile("npz: the same member twice")
def _(box: Box) -> tuple[Callable[[], object], str]:
    call, _ = _npz(box, {}, "")
    with zipfile.ZipFile(box.path / "X.trn.npz", "a") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        archive.writestr("data.npy", _object_array(box, (3,)))
    return call, "twice"


def _zeros(size: int) -> Iterator[bytes]:
    return (bytes(1 << 20) for _ in range(size >> 20))


@_hostile("gzip: a bomb")
def _(box: Box) -> tuple[Callable[[], object], str]:
    return _convert(box, "t.jsonl.gz", gzip.compress(bytes(100 << 20), 1)), "64 MiB"


@_hostile("xz: a bomb")
def _(box: Box) -> tuple[Callable[[], object], str]:
    packer = lzma.LZMACompressor(preset=0)
    content = b"".join([*(packer.compress(piece) for piece in _zeros(100 << 20)), packer.flush()])
    return _convert(box, "t.csv.xz", content), "64 MiB"


@_hostile("zstd: a bomb")
def _(box: Box) -> tuple[Callable[[], object], str]:
    packer = zstandard.ZstdCompressor().compressobj()
    content = b"".join([*(packer.compress(piece) for piece in _zeros(500 << 20)), packer.flush()])
    return _convert(box, "t.tsv.zst", content), "64 MiB"


@_hostile("zstd: a window beyond all memory")
def _(box: Box) -> tuple[Callable[[], object], str]:
    content = b"\x28\xb5\x2f\xfd" + bytes([0b00000000, 0b11111111]) + b"\x01\x00\x00"
    return _convert(box, "t.jsonl.zst", content), "zstd data"


@_hostile("zstd: a bomb of lines")
def _(box: Box) -> tuple[Callable[[], object], str]:
    packed = zstandard.ZstdCompressor().compress(_LINE * 1_000_000)
    return _convert(box, "t.jsonl.zst", packed * 64), "times its size"


@_hostile("jsonl: nesting beyond the stack")
def _(box: Box) -> tuple[Callable[[], object], str]:
    return _convert(box, "t.jsonl", b'{"text": ' + b"[" * 10_000_000 + b"\n"), "nested too deeply"


@_hostile("jsonl: a number of a million digits")
def _(box: Box) -> tuple[Callable[[], object], str]:
    return _convert(box, "t.jsonl", b'{"text": "a", "labels": [' + b"9" * 1_000_000 + b"]}\n"), "digits"


@_hostile("a device as input")
def _(box: Box) -> tuple[Callable[[], object], str]:
    (box.path / "t.jsonl").symlink_to("/dev/zero")
    return lambda: open_source(box.path / "t.jsonl", "auto"), "not a regular file"


@_hostile("a pipe as input")
def _(box: Box) -> tuple[Callable[[], object], str]:
    os.mkfifo(box.path / "t.jsonl")
    return lambda: open_source(box.path / "t.jsonl", "auto"), "not a regular file"


@_hostile("xc-bow: a header that claims a trillion rows")
def _(box: Box) -> tuple[Callable[[], object], str]:
    return _convert(box, "train.txt", b"999999999999 4 3\n0 1:1\n"), "999999999999"


@_hostile("filter: a row beyond all numbers")
def _(box: Box) -> tuple[Callable[[], object], str]:
    (box.path / "filter.txt").write_bytes(b"0 " + b"9" * 4000 + b"\n")
    (box.path / "test.jsonl").write_bytes(_LINE)
    options = {"test": [box.path / "test.jsonl"], "filter": box.path / "filter.txt", "tokenizer": "train:64"}
    return _convert(box, "t.jsonl", _LINE * 20, **options), "filter.txt:1"


@_hostile("configuration: YAML tags and reduce")
def _(box: Box) -> tuple[Callable[[], object], str]:
    path = box.path / "c.toml"
    path.write_text(f'[encoder]\n"__reduce__" = "{box.canary}"\n"py/object" = "os.system"\n')
    return lambda: load_config(path), "__reduce__"


@_hostile("configuration: larger than any")
def _(box: Box) -> tuple[Callable[[], object], str]:
    path = box.path / "c.toml"
    with open(path, "wb") as stream:
        stream.truncate(1 << 30)
    return lambda: load_config(path), "larger than"


def _encoder_folder(box: Box, config: dict[str, object]) -> Path:
    folder = box.path / "encoder"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("modeling_evil.py", "configuration_evil.py", "tokenization_evil.py", "__init__.py"):
        (folder / name).write_text(box.code)
    return folder


def _create(folder: Path) -> Callable[[], object]:
    config = EncoderConfig(kind="transformer", name=str(folder))
    return lambda: create_encoder(config, vocab_size=100, max_length=8, seed=0, tokenizer=None)


_AUTO = {"AutoModel": "modeling_evil.Evil", "AutoConfig": "configuration_evil.Evil"}
_BERT = {
    "model_type": "bert", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1,
    "intermediate_size": 16, "vocab_size": 100,
}  # fmt: skip


@_hostile("encoder: a model of its own code")
def _(box: Box) -> tuple[Callable[[], object], str]:
    return _create(_encoder_folder(box, {"model_type": "evil", "auto_map": _AUTO})), "encoder.name"


@_hostile("encoder: a known model with its own code and pickled weights")
def _(box: Box) -> tuple[Callable[[], object], str]:
    folder = _encoder_folder(box, {**_BERT, "auto_map": _AUTO})
    torch.save({"weight": torch.zeros(1), "x": box.payload}, folder / "pytorch_model.bin")
    return _create(folder), "encoder.name"


@_hostile("encoder: a pickle named safetensors")
def _(box: Box) -> tuple[Callable[[], object], str]:
    folder = _encoder_folder(box, _BERT)
    (folder / "model.safetensors").write_bytes(pickle.dumps(box.payload))
    return _create(folder), "encoder.name"


@_hostile("encoder: weights that claim a header of an exabyte")
def _(box: Box) -> tuple[Callable[[], object], str]:
    folder = _encoder_folder(box, _BERT)
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    return _create(folder), "encoder.name"


@_hostile("encoder: an index of weights that leads elsewhere")
def _(box: Box) -> tuple[Callable[[], object], str]:
    folder = _encoder_folder(box, _BERT)
    index = {"metadata": {}, "weight_map": {"embeddings.word_embeddings.weight": "../../outside/x.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return _create(folder), "encoder.name"


@_hostile("encoder: layers without end")
def _(box: Box) -> tuple[Callable[[], object], str]:
    return _create(_encoder_folder(box, {**_BERT, "num_hidden_layers": "many"})), "encoder.name"


@_hostile("tokenizer: a folder with its own code")
def _(box: Box) -> tuple[Callable[[], object], str]:
    folder = _encoder_folder(box, {"model_type": "evil"})
    auto_map = {"auto_map": {"AutoTokenizer": ["tokenization_evil.Evil", None]}, "tokenizer_class": "Evil"}
    (folder / "tokenizer_config.json").write_text(json.dumps(auto_map))
    return _convert(box, "t.jsonl", _LINE, tokenizer=str(folder)), "tokenizer.json"


@_hostile("tokenizer: a pickle")
def _(box: Box) -> tuple[Callable[[], object], str]:
    (box.path / "tokenizer").mkdir()
    (box.path / "tokenizer" / "tokenizer.json").write_bytes(pickle.dumps(box.payload))
    return _convert(box, "t.jsonl", _LINE, tokenizer=str(box.path / "tokenizer")), "tokenizer.json"


@_hostile("tokenizer: nesting beyond the stack")
def _(box: Box) -> tuple[Callable[[], object], str]:
    (box.path / "tokenizer").mkdir()
    (box.path / "tokenizer" / "tokenizer.json").write_bytes(b'{"model":' + b"[" * 1_000_000)
    return _convert(box, "t.jsonl", _LINE, tokenizer=str(box.path / "tokenizer")), "tokenizer.json"
