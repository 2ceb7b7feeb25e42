"""Turn text lines, label names and a sparse label matrix (Extreme Classification Repository) into JSONL.

python tools/xc_to_jsonl.py raw/trn_X.txt trn_X_Y.txt raw/Y.txt > train.jsonl
"""

import json
import sys
from pathlib import Path


def _lines(path: str) -> list[str]:
    text = Path(path).read_bytes().decode("utf-8")
    lines = text.split("\n")
    return lines[:-1] if lines[-1] == "" else lines


def main(texts_file: str, matrix_file: str, names_file: str) -> int:
    """Write the rows to stdout; 2 with a sentence on stderr when the files do not fit together."""
    texts, names = _lines(texts_file), _lines(names_file)
    header, *rows = _lines(matrix_file)
    if header.split() != [str(len(texts)), str(len(names))] or len(rows) != len(texts):
        sizes = f"{len(texts)} texts, {len(names)} names and {len(rows)} rows"
        print(f"{matrix_file}:1: header {header!r} does not fit {sizes}.", file=sys.stderr)
        return 2
    for number, (text, row) in enumerate(zip(texts, rows, strict=True), start=2):
        ids = [int(entry.split(":")[0]) for entry in row.split()]
        if ids and not 0 <= min(ids) <= max(ids) < len(names):
            print(f"{matrix_file}:{number}: a label id is not in [0, {len(names)}).", file=sys.stderr)
            return 2
        labels = [names[i] for i in ids]
        print(json.dumps({"text": text, "labels": labels}, ensure_ascii=False))
    return 0


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    sys.exit(main(*sys.argv[1:4]))
