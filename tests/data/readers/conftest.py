"""One small corpus, written in every format of texts."""

import csv
import gzip
import io
import json
import lzma
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import zstandard

Rows = list[tuple[str, list[int]]]

NAMES = [f"name-{number}" for number in range(40)]
ODD_TEXTS = [
    "the naïve café, 'quoted'",
    'she said "hi"',
    "semi; colon | bar",
    "日本語 text",
    "a\u2028b\u0085c",
    '5" nail',
]
PACK: dict[str, Callable[[bytes], bytes]] = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}


def corpus(rows: int, seed: int) -> Rows:
    """Texts with ids of labels; some texts are hard to write, the last row has no label."""
    chance = random.Random(seed)
    words = ["read", "tensor", "file", "check", "größe", "sum"]
    texts = ODD_TEXTS + [" ".join(chance.choices(words, k=chance.randrange(1, 7))) for _ in range(rows)]
    made = [(text, chance.sample(range(len(NAMES)), k=chance.randrange(1, 5))) for text in texts[:rows]]
    return [*made[:-1], (made[-1][0], [])]


def _names(labels: list[int]) -> list[str]:
    return [NAMES[label] for label in labels]


def _jsonl(rows: Rows) -> bytes:
    lines = [json.dumps({"text": text, "labels": _names(labels)}, ensure_ascii=False) for text, labels in rows]
    return "".join(f"{line}\n" for line in lines).encode()


def _table(rows: Rows, **dialect: Any) -> bytes:
    stream = io.StringIO(newline="")
    writer = csv.writer(stream, **dialect)
    writer.writerow(["id", "text", "labels"])
    writer.writerows([number, text, "|".join(_names(labels))] for number, (text, labels) in enumerate(rows))
    return stream.getvalue().encode()


def _parquet(rows: Rows) -> bytes:
    table = pyarrow.table({"text": [text for text, _ in rows], "labels": [_names(labels) for _, labels in rows]})
    stream = io.BytesIO()
    pyarrow.parquet.write_table(table, stream, row_group_size=50)
    return stream.getvalue()


def _xc_json(rows: Rows) -> bytes:
    lines = [
        json.dumps(
            {"uid": str(number), "title": text, "content": "", "target_ind": labels, "target_rel": [1.0] * len(labels)}
        )
        for number, (text, labels) in enumerate(rows)
    ]
    return "".join(f"{line}\n" for line in lines).encode()


def sparse_labels(rows: Rows) -> bytes:
    """The labels as sparse lines below their header."""
    lines = [" ".join(f"{label}:1.00000" for label in labels) for _, labels in rows]
    return f"{len(rows)} {len(NAMES)}\n".encode() + "".join(f"{line}\n" for line in lines).encode()


def _annif(rows: Rows) -> bytes:
    lines = [f"{text}\t{' '.join(f'<{name}>' for name in _names(labels))}" for text, labels in rows]
    return "".join(f"{line}\n" for line in lines).encode()


def _annif_jsonl(rows: Rows) -> bytes:
    lines = [
        json.dumps({"document_id": number, "text": text, "subjects": [{"uri": name} for name in _names(labels)]})
        for number, (text, labels) in enumerate(rows)
    ]
    return "".join(f"{line}\n" for line in lines).encode()


WRITERS: dict[str, tuple[str, Callable[[Rows], bytes]]] = {
    "jsonl": ("{}.jsonl", _jsonl),
    "csv": ("{}.csv", _table),
    "csv with semicolons": ("{}.csv", lambda rows: _table(rows, delimiter=";", lineterminator="\n")),
    "tsv": ("{}.tsv", lambda rows: _table(rows, delimiter="\t", lineterminator="\n")),
    "parquet": ("{}.parquet", _parquet),
    "xc-json": ("{}.json", _xc_json),
    "xc-text": ("raw/{}_X.txt", lambda rows: "".join(f"{text}\n" for text, _ in rows).encode()),
    "annif tsv": ("{}.tsv", _annif),
    "annif jsonl": ("{}.jsonl", _annif_jsonl),
}


def write_format(folder: Path, name: str, splits: dict[str, Rows], ending: str = "") -> dict[str, Path]:
    """Write splits in a format, with the files that stand beside; returns the main file of each."""
    pattern, write = WRITERS[name]
    pack = PACK[ending]
    (folder / "raw").mkdir(parents=True)
    files = {}
    for split, rows in splits.items():
        files[split] = folder / (pattern.format(split) + ending)
        files[split].write_bytes(pack(write(rows)))
        if name == "xc-text":
            (folder / f"{split}_X_Y.txt{ending}").write_bytes(pack(sparse_labels(rows)))
    if name == "xc-text":
        (folder / "raw" / f"Y.txt{ending}").write_bytes(pack("".join(f"{each}\n" for each in NAMES).encode()))
    if name == "xc-json":
        lines = [json.dumps({"uid": str(place), "title": each, "content": ""}) for place, each in enumerate(NAMES)]
        (folder / f"lbl.json{ending}").write_bytes(pack("".join(f"{line}\n" for line in lines).encode()))
    return files
