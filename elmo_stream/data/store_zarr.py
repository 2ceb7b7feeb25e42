"""Shards as Zarr v3 groups: one-dimensional arrays, compressed with zstd and guarded by CRC-32C.

An array is one chunk unless it is larger than 64 MiB, since shards are only ever read whole. Zarr reads a chunk file
that does not exist as fill values, and the size that a zstd frame declares is allocated before a byte is decoded: so
Zarr sees files only after their names, sizes and headers were compared with what the shard must have.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.buffer import default_buffer_prototype
from zarr.codecs import BytesCodec, Crc32cCodec, ZstdCodec
from zarr.storage import MemoryStore

from elmo_stream.data.store import ArraySpec, Shard

_MAX_CHUNK_BYTES = 64 << 20
_MAX_METADATA_BYTES = 64 << 10
_FRAME_BYTES = 128
_ZSTD_LEVEL = 3
_CODECS = (BytesCodec, ZstdCodec, Crc32cCodec)
_METADATA = "zarr.json"
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"


class ZarrBackend:
    """See :class:`elmo_stream.data.store.Backend`."""

    def write(self, folder: Path, shard: Shard, specs: Sequence[ArraySpec]) -> None:
        """See :class:`elmo_stream.data.store.Backend`.

        Zarr's own files are written by several tasks, of which one that fails leaves the others behind.
        """
        content: dict[str, Any] = {}
        group = zarr.create_group(MemoryStore(content), zarr_format=3)
        for spec in specs:
            array = group.create_array(
                spec.name,
                shape=(spec.length,),
                dtype=spec.dtype,
                chunks=(_chunk_length(spec),),
                compressors=[ZstdCodec(level=_ZSTD_LEVEL), Crc32cCodec()],
                fill_value=0,
                config={"write_empty_chunks": True},
            )
            array[:] = getattr(shard, spec.name).astype(spec.dtype, copy=False)
        for name, data in content.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data.as_buffer_like())

    def lengths(self, folder: Path) -> dict[str, int]:
        """See :class:`elmo_stream.data.store.Backend`."""
        group = zarr.open_group(folder, mode="r", zarr_format=3)
        return {name: array.shape[0] for name, array in group.arrays()}

    def files(self, specs: Sequence[ArraySpec]) -> dict[str, int]:
        """See :class:`elmo_stream.data.store.Backend`; zstd grows data that it cannot compress by 1/256 at most."""
        most = {_METADATA: _MAX_METADATA_BYTES}
        for spec in specs:
            most[f"{spec.name}/{_METADATA}"] = _MAX_METADATA_BYTES
            chunk_bytes = _chunk_length(spec) * spec.dtype.itemsize
            for chunk in range(_chunks(spec)):
                most[f"{spec.name}/c/{chunk}"] = chunk_bytes + chunk_bytes // 256 + _FRAME_BYTES
        return most

    def read(self, content: Mapping[str, bytes], specs: Sequence[ArraySpec]) -> Shard:
        """See :class:`elmo_stream.data.store.Backend`."""
        for spec in specs:
            for chunk in range(_chunks(spec)):
                name = f"{spec.name}/c/{chunk}"
                if _declared_bytes(content[name]) != _chunk_length(spec) * spec.dtype.itemsize:
                    raise ValueError(f"{name}: is not a zstd frame of the chunk's size")
        buffer = default_buffer_prototype().buffer
        try:
            memory = MemoryStore({name: buffer.from_bytes(data) for name, data in content.items()}, read_only=True)
            group = zarr.open_group(memory, mode="r", zarr_format=3)
            arrays = {spec.name: _read_array(group[spec.name], spec) for spec in specs}
        except Exception as error:  # zarr and its codecs raise many kinds for damaged bytes
            raise ValueError(f"{_METADATA}: the group cannot be decoded ({error})") from error
        arrays["labels"] = arrays["labels"].astype(np.int64)
        return Shard(**arrays)


def _read_array(array: Any, spec: ArraySpec) -> NDArray[Any]:
    declared = (array.shape, array.chunks, array.dtype)
    if declared != ((spec.length,), (_chunk_length(spec),), spec.dtype):
        raise ValueError(f"{spec.name} declares {declared}, which is not {spec.length} values of {spec.dtype}")
    # A frame within a frame would hide its size from the look at headers.
    if tuple(map(type, array.metadata.codecs)) != _CODECS:
        raise ValueError(f"{spec.name} is coded by {array.metadata.codecs}, which no shard is")
    return np.asarray(array[:])


def _chunk_length(spec: ArraySpec) -> int:
    return max(1, min(spec.length, _MAX_CHUNK_BYTES // spec.dtype.itemsize))


def _chunks(spec: ArraySpec) -> int:
    return -(-spec.length // _chunk_length(spec))


def _declared_bytes(frame: bytes) -> int | None:
    """Size that a zstd frame says it decompresses to (RFC 8878, section 3.1.1); None when it says none."""
    if len(frame) < 5 or not frame.startswith(_ZSTD_MAGIC):
        return None
    descriptor = frame[4]
    single_segment = descriptor >> 5 & 1
    width = (single_segment, 2, 4, 8)[descriptor >> 6]
    start = 5 + (not single_segment) + (0, 1, 2, 4)[descriptor & 3]
    size = int.from_bytes(frame[start : start + width], "little")
    return size + 256 if width == 2 else size if width else None
