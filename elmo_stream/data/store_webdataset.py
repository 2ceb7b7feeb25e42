"""Shards as WebDataset tars: one sample per block of 1,024 rows, which holds the arrays of these rows as ``.npy``.

A sample per document would spend two KiB of headers on a title of a hundred bytes. Members are
``BLOCK.ARRAY.npy`` in a fixed order, and a reader compares every header with the one that the writer would have
written; so nothing is parsed that a stranger may have made up: no other member names, no links, no pickles.
"""

import tarfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from elmo_stream.data.store import ArraySpec, Shard, concatenate

BLOCK_ROWS = 1024
TAR_NAME = "blocks.tar"
_TAR_BLOCK = tarfile.BLOCKSIZE
_SIZE_FIELD = slice(124, 135)
_NPY_BYTES = 128


class WebDatasetBackend:
    """See :class:`elmo_stream.data.store.Backend`."""

    def write(self, folder: Path, shard: Shard, specs: Sequence[ArraySpec]) -> None:
        """See :class:`elmo_stream.data.store.Backend`."""
        with open(folder / TAR_NAME, "wb") as stream:
            for number, first in enumerate(range(0, shard.rows, BLOCK_ROWS)):
                block = shard.rows_between(first, min(first + BLOCK_ROWS, shard.rows))
                for spec in specs:
                    values = getattr(block, spec.name).astype(spec.dtype, copy=False)
                    payload = _npy_header(spec, len(values)) + values.tobytes()
                    stream.write(_tar_header(_member(number, spec), len(payload)) + payload)
                    stream.write(bytes(-len(payload) % _TAR_BLOCK))
            stream.write(_end(stream.tell()))

    def lengths(self, folder: Path) -> dict[str, int]:
        """See :class:`elmo_stream.data.store.Backend`."""
        lengths: Counter[str] = Counter()
        blocks = 0
        with tarfile.open(folder / TAR_NAME, "r:") as tar:
            for member in tar:
                stream = tar.extractfile(member)
                assert stream is not None
                np.lib.format.read_magic(stream)
                shape, _, _ = np.lib.format.read_array_header_1_0(stream)
                name = member.name.split(".")[1]
                blocks += name == "token_offsets"
                lengths[name] += shape[0]
        return {name: length - (blocks - 1) * name.endswith("_offsets") for name, length in lengths.items()}

    def files(self, specs: Sequence[ArraySpec]) -> dict[str, int]:
        """See :class:`elmo_stream.data.store.Backend`."""
        blocks = -(-specs[0].length // BLOCK_ROWS) + 1
        members = blocks * len(specs) * (2 * _TAR_BLOCK + _NPY_BYTES + 8)
        return {TAR_NAME: sum(spec.nbytes for spec in specs) + members + tarfile.RECORDSIZE}

    def read(self, content: Mapping[str, bytes], specs: Sequence[ArraySpec]) -> Shard:
        """See :class:`elmo_stream.data.store.Backend`."""
        lengths = {spec.name: spec.length for spec in specs}
        rows = lengths["token_offsets"] - 1
        stream = _Tar(content[TAR_NAME])
        blocks = []
        for number, first in enumerate(range(0, rows, BLOCK_ROWS)):
            arrays = {spec.name: stream.take(_member(number, spec), spec) for spec in specs}
            block = Shard(**arrays | {"labels": arrays["labels"].astype(np.int64)})
            if block.rows != min(BLOCK_ROWS, rows - first) or not _fits_together(block):
                raise ValueError(f"{TAR_NAME}: the arrays of block {number} do not fit together")
            blocks.append(block)
        stream.expect_end()
        shard = concatenate(blocks)
        if any(len(getattr(shard, name)) != length for name, length in lengths.items()):
            raise ValueError(f"{TAR_NAME}: the blocks do not add up to the sizes in the index")
        return shard


class _Tar:
    """Takes members from a tar in the order in which they must come, as views of its bytes."""

    def __init__(self, content: bytes) -> None:
        self._content, self._at = content, 0

    def take(self, name: str, spec: ArraySpec) -> NDArray[Any]:
        """Values of the next member, which must be ``name`` with an array of the spec's type."""
        header = self._content[self._at : self._at + _TAR_BLOCK]
        try:
            size = int(header[_SIZE_FIELD], 8)
        except ValueError:
            size = -1
        begin = self._at + _TAR_BLOCK
        count = (size - _NPY_BYTES) // spec.dtype.itemsize
        if not 0 <= count <= spec.length or begin + size > len(self._content) or header != _tar_header(name, size):
            raise ValueError(f"{TAR_NAME}: does not have the member {name} at byte {self._at}")
        values = begin + _NPY_BYTES
        if self._content[begin:values] != _npy_header(spec, count) or size != _NPY_BYTES + count * spec.dtype.itemsize:
            raise ValueError(f"{TAR_NAME}: member {name} is not a list of {spec.dtype}")
        self._at = begin + size + -size % _TAR_BLOCK
        return np.frombuffer(self._content, spec.dtype, count, values)

    def expect_end(self) -> None:
        """Nothing may follow but the end of the tar."""
        if self._content[self._at :] != _end(self._at):
            raise ValueError(f"{TAR_NAME}: does not end at byte {self._at}")


def _fits_together(block: Shard) -> bool:
    pairs = [(block.tokens, block.token_offsets), (block.labels, block.label_offsets)]
    if block.token_weights is not None:
        pairs.append((block.token_weights, block.token_offsets))
    return all(
        len(offsets) == block.rows + 1 and offsets[0] == 0 and offsets[-1] == len(values) for values, offsets in pairs
    )


def _member(block: int, spec: ArraySpec) -> str:
    return f"{block:05d}.{spec.name}.npy"


def _tar_header(name: str, size: int) -> bytes:
    member = tarfile.TarInfo(name)
    member.size = size
    return member.tobuf(tarfile.USTAR_FORMAT)


def _end(at: int) -> bytes:
    """What ends a tar whose members take ``at`` bytes: two blocks of zeros, and more up to a whole record."""
    return bytes(2 * _TAR_BLOCK + -(at + 2 * _TAR_BLOCK) % tarfile.RECORDSIZE)


def _npy_header(spec: ArraySpec, length: int) -> bytes:
    """The header of version 1.0 of the ``.npy`` format, padded to 128 bytes, for a list of values."""
    text = f"{{'descr': '{spec.dtype.str}', 'fortran_order': False, 'shape': ({length},), }}"
    start = np.lib.format.magic(1, 0) + (_NPY_BYTES - 10).to_bytes(2, "little")
    return start + text.ljust(_NPY_BYTES - 11).encode() + b"\n"
