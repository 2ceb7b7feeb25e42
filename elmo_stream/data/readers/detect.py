"""Which format a file is in, and which files belong to it: by endings, first bytes, and the repository's names."""

import json
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from elmo_stream.data.readers import FORMATS
from elmo_stream.data.readers.instance import InputFile, Source
from elmo_stream.data.readers.lines import BOM
from elmo_stream.data.readers.sparse import parse_header
from elmo_stream.data.readers.unpack import NPZ, PACKED_ENDINGS, packing_of, read_unpacked
from elmo_stream.errors import UserError

HEAD_BYTES = 1 << 20
_BY_ENDING = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".npz": "npz",
    ".txt": "xc-text",
}
_BOW_ROW = re.compile(rb"[\d,]*(\s+\d\S*)*\s*|\d+:\S*(\s+\d\S*)*\s*")
_STEM_OF_MAIN = re.compile(r"^(?P<split>.*?)_?(X_Xf|X|raw_texts|texts)$|^X\.(?P<pecos>.+)$")


def open_source(path: Path, format: str, label_file: Path | None = None, *, labeled: bool = True) -> tuple[Source, str]:
    """Find out what a file is.

    Args:
        format: of the registry, or ``auto``.
        label_file: the file of the labels, where they are not in the file; by default the one beside it by the
            repository's naming.
        labeled: whether labels are to be read at all.

    Returns:
        The source, and in words what it is taken for and why.

    Raises:
        UserError: the file is missing or not a regular file, or its format is not known.
    """
    main = _open_file(path)
    if format == "auto":
        format, why = _guess(main)
    elif format in FORMATS:
        why = "as --format says"
    else:
        raise UserError(f"--format {format}: unknown; expected auto, {', '.join(FORMATS)}.")
    if main.packing == NPZ and format != NPZ:
        raise UserError(f"{path}: is an .npz archive by its name, which --format {format} cannot be.")
    if format in ("npz", "parquet") and main.packing not in ("", NPZ):
        raise UserError(f"{path}: is {main.packing} data, but {format} is compressed in itself; unpack it first.")
    note = f"{path}: {format}, {why}" + (f"; {main.packing} data" if main.packing not in ("", NPZ) else "")
    labels = None
    if not FORMATS[format].beside or (format == "xc-bow" and _has_labels(main)):
        if label_file is not None:
            raise UserError(f"--label-file: {path} holds its labels in itself; leave the option out.")
    elif labeled:
        found = label_file or _label_file_beside(path)
        if found is None:
            raise UserError(
                f"{path}: no file with its labels stands beside it (looked for "
                f"{', '.join(_candidate_names(path)) or 'names like trn_X_Y.txt'}); name it with --label-file."
            )
        labels = _open_file(found)
        note += f"; labels in {found}"
    return Source(format, main, labels), note


def read_head(file: InputFile) -> bytes:
    """The first bytes of a file, unpacked, without a byte order mark; one that is whole gets a line end behind it."""
    head = b""
    for piece in read_unpacked(file):
        head += piece
        if len(head) >= HEAD_BYTES:
            break
    else:
        head += b"\n"
    return head[:HEAD_BYTES].removeprefix(BOM)


def list_of_labels_beside(path: Path, format: str) -> Path | None:
    """The list of labels that the repository keeps with such a file: ``lbl.json`` or ``Y.txt``."""
    names = {"xc-json": ["lbl"], "xc-text": ["Y"], "xc-bow": ["Y"], "npz": ["Y"]}.get(format, [])
    ending = ".json" if format == "xc-json" else ".txt"
    folders = [path.parent, path.parent / "raw"] if format != "xc-json" else [path.parent]
    return _first_file(folders, [f"{name}{ending}" for name in names])


def _open_file(path: Path) -> InputFile:
    if not path.exists():
        raise UserError(f"{path}: no such file.")
    if not stat.S_ISREG(path.stat().st_mode):
        raise UserError(f"{path}: not a regular file; the conversion reads its input twice, so give a file on disk.")
    return InputFile(path, path, NPZ if path.suffix.lower() == ".npz" else packing_of(path))


def _guess(file: InputFile) -> tuple[str, str]:
    ending = _plain_name(file.name).suffix.lower()
    format = _BY_ENDING.get(ending)
    if format is None:
        raise UserError(
            f"{file.name}: the ending '{ending}' says no known format; expected one of {', '.join(_BY_ENDING)}, "
            f"perhaps with {', '.join(PACKED_ENDINGS)}; rename it, or say `shard --format {'|'.join(FORMATS)}`."
        )
    if format in ("jsonl", "tsv", "xc-text"):
        lines = [line for line in read_head(file).split(b"\n")[:50] if line.strip()]
        if special := _by_content(format, lines):
            return special
    if format == "xc-text":
        return format, "by its ending and no header of numbers"
    return format, f"by its ending {ending}"


def _by_content(format: str, lines: list[bytes]) -> tuple[str, str] | None:
    """The format that the first lines show, where several share an ending."""
    if not lines:
        return None
    if format == "jsonl":
        objects = [_object(line) for line in lines]
        if "target_ind" in objects[0]:
            return "xc-json", "by the field 'target_ind' in its first line"
        subjects = next((found for each in objects if isinstance(found := each.get("subjects"), list) and found), [])
        if subjects and "labels" not in objects[0] and all(isinstance(subject, dict) for subject in subjects):
            return "annif", "by the objects in its field 'subjects'"
    elif format == "tsv":
        cells = lines[0].rstrip(b"\r").split(b"\t")
        if len(cells) == 2 and cells[1].split() and all(_is_uri(cell) for cell in cells[1].split()):
            return "annif", "by the URIs in the second column of its first line"
    elif header := parse_header(lines[0]):
        alike = [bool(_BOW_ROW.fullmatch(row)) for row in lines[1:]]
        if all(alike) or (len(header) == 3 and any(alike)):
            return "xc-bow", f"by its first line of {len(header)} numbers"
    return None


def _object(line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _is_uri(cell: bytes) -> bool:
    return (cell.startswith(b"<") and cell.endswith(b">")) or cell.startswith((b"http://", b"https://"))


def _has_labels(file: InputFile) -> bool:
    header = parse_header(read_head(file).partition(b"\n")[0])
    return header is None or len(header) == 3


def _plain_name(path: Path) -> Path:
    return path.with_suffix("") if path.suffix.lower() in PACKED_ENDINGS else path


def _label_file_beside(path: Path) -> Path | None:
    return _first_file([path.parent, path.parent.parent], _candidate_names(path))


def _candidate_names(path: Path) -> list[str]:
    match = _STEM_OF_MAIN.match(_plain_name(path).stem)
    if match is None:
        return []
    if match["pecos"]:
        return [f"Y.{match['pecos']}.npz", f"Y.{match['pecos']}.txt"]
    split = f"{match['split']}_".removeprefix("_")
    return [f"{split}X_Y.txt", f"{split}X_Y.npz", f"{split}Y.npz", f"{split}labels.txt"]


def _first_file(folders: list[Path], names: list[str]) -> Path | None:
    return next(_existing(folders, names), None)


def _existing(folders: list[Path], names: list[str]) -> Iterator[Path]:
    for folder in folders:
        for name in names:
            for ending in ("", *PACKED_ENDINGS):
                if (path := folder / f"{name}{ending}").is_file():
                    yield path
