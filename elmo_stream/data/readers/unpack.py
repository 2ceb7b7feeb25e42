"""Packed files: gzip, xz and zstd streams, known by their first bytes, and the arrays inside an ``.npz``.

The passes of the converter read a file in parts and more than once, which a packed one does not allow; so it is
unpacked once into the scratch of the conversion.
"""

import errno
import lzma
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import zstandard

from elmo_stream.data.readers.instance import MAX_LINE_BYTES, InputFile
from elmo_stream.errors import UserError
from elmo_stream.files import naming, new_folder, reading

NPZ = "npz"
_PIECE = 4096  # a packed piece gives at most 32,768 times as much, which bounds the memory
_MAX_RATIO, _FREE_BYTES = 1000, 1 << 30
_MEMORY = 1 << 28
_NPZ_ARRAYS = ("data", "indices", "indptr", "shape", "format")

_DECODERS: dict[str, tuple[bytes, Callable[[], Any]]] = {
    "gzip": (b"\x1f\x8b", lambda: zlib.decompressobj(wbits=31)),
    "xz": (b"\xfd7zXZ\x00", lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_MEMORY)),
    "zstd": (b"\x28\xb5\x2f\xfd", lambda: zstandard.ZstdDecompressor(max_window_size=_MEMORY).decompressobj()),
}
PACKED_ENDINGS = {".gz": "gzip", ".xz": "xz", ".zst": "zstd"}


def packing_of(path: Path) -> str:
    """How a file is packed, by its first bytes; empty for not at all.

    Raises:
        UserError: the name promises another packing than the bytes hold.
    """
    with reading(path) as stream:
        head = stream.read(8)
    found = next((name for name, (magic, _) in _DECODERS.items() if head.startswith(magic)), "")
    promised = PACKED_ENDINGS.get(path.suffix.lower(), "")
    if promised and promised != found:
        raise UserError(f"{path}: is named as {promised} data but its first bytes are not; rename it or pack it again.")
    return found


def read_unpacked(file: InputFile) -> Iterator[bytes]:
    """The plain bytes of a file in pieces, from front to back.

    Raises:
        UserError: the packed data are damaged or cut.
    """
    if not file.packing:
        with reading(file.path) as stream:
            while piece := stream.read(1 << 20):
                yield piece
        return
    new = _DECODERS[file.packing][1]
    decoder = new()
    with reading(file.path) as stream:
        while piece := stream.read(_PIECE):
            while piece := piece.lstrip(b"\0") if decoder.eof else piece:
                if decoder.eof:
                    decoder = new()
                try:
                    plain = decoder.decompress(piece)
                except (zlib.error, lzma.LZMAError, zstandard.ZstdError) as error:
                    raise UserError(f"{file.name}: the {file.packing} data are damaged ({error}).") from error
                if plain:
                    yield plain
                piece = decoder.unused_data if decoder.eof else b""
    if not decoder.eof:
        raise UserError(f"{file.name}: the {file.packing} data end too early; the file was cut.")


@dataclass(frozen=True)
class UnpackTask:
    """Unpack ``file`` into ``folder``, which appears when it is complete."""

    file: InputFile
    folder: Path


def unpack_file(task: UnpackTask) -> InputFile:
    """Unpack, unless it was done before; returns and raises what :func:`unpack` does."""
    if not task.folder.is_dir():
        with new_folder(task.folder) as temporary:
            unpack(task.file, temporary)
    return replace(task.file, path=_unpacked_path(task.file, task.folder), packing="")


def unpack(file: InputFile, folder: Path) -> InputFile:
    """Unpack into an existing folder; returns the file as it is now.

    Raises:
        UserError: damaged or cut data, a line beyond 64 MiB, or a file that blows up a thousandfold.
    """
    if file.packing == NPZ:
        _unpack_npz(file, folder)
        return replace(file, path=folder, packing="")
    plain = _unpacked_path(file, folder)
    limit = _most_bytes(file)
    written = line_begun = 0
    with open(plain, "wb") as stream:
        for piece in read_unpacked(file):
            stream.write(piece)
            if (line_end := piece.rfind(b"\n")) >= 0:
                line_begun = written + line_end + 1
            written += len(piece)
            if written - line_begun > MAX_LINE_BYTES:
                raise UserError(f"{file.name}: unpacks to a line of more than {MAX_LINE_BYTES >> 20} MiB.")
            if written > limit:
                raise UserError(
                    f"{file.name}: unpacks to more than {_MAX_RATIO} times its size, as no text does; "
                    "if it is one, unpack it yourself."
                )
    return replace(file, path=plain, packing="")


def _unpacked_path(file: InputFile, folder: Path) -> Path:
    return folder if file.packing == NPZ else folder / "plain"


def _most_bytes(file: InputFile) -> int:
    return max(_FREE_BYTES, _MAX_RATIO * file.path.stat().st_size)


def _unpack_npz(file: InputFile, folder: Path) -> None:
    """The arrays of a sparse matrix as files to be mapped; members have fixed names, so none leaves the folder."""
    try:
        with reading(file.path) as stream, zipfile.ZipFile(stream) as archive:
            members: dict[str, zipfile.ZipInfo] = {}
            for each in archive.infolist():
                if each.filename in members or set(each.filename) & set("/\\\0"):
                    raise UserError(f"{file.name}: has the member {each.filename!r:.200} twice, or in a folder.")
                if each.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                    raise UserError(
                        f"{file.name}: packs {each.filename!r:.200} in another way than scipy and numpy do."
                    )
                members[each.filename] = each
            if sum(each.file_size for each in members.values()) > _most_bytes(file):
                raise UserError(f"{file.name}: unpacks to more than {_MAX_RATIO} times its size.")
            for name in _NPZ_ARRAYS:
                if (member := members.get(f"{name}.npy")) is None:
                    raise UserError(
                        f"{file.name}: has no array '{name}' (arrays: {', '.join(members)[:200]}); expected a sparse "
                        "matrix in CSR form, as scipy.sparse.save_npz writes it."
                    )
                target = folder / f"{name}.npy"
                with archive.open(member) as packed, naming(target), open(target, "wb") as plain:
                    plain.writelines(_pieces(packed, file.path))
    # What zipfile makes of damage, cut files, unknown compressions, passwords, and places that cannot be.
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        raise UserError(f"{file.name}: not a whole .npz archive ({error}).") from error
    except OSError as error:
        if error.errno != errno.EINVAL:  # which a place before the beginning of the file gives
            raise
        raise UserError(f"{file.name}: not a whole .npz archive (it names a place outside).") from error


def _pieces(member: IO[bytes], archive: Path) -> Iterator[bytes]:
    with naming(archive):
        while piece := member.read(1 << 20):
            yield piece
