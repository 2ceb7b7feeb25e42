"""Files that no reader may take: one registry for the tests of the readers and for the attacks on them."""

import io
import zipfile

import numpy as np
import pyarrow
import pyarrow.parquet
import scipy.sparse

GOOD = b'{"text": "a good line", "labels": ["one"]}\n'

MALFORMED = {
    "not json": (b"hello", "not valid JSON"),
    "cut off": (b'{"text": "a", "labels": ["b"', "not valid JSON"),
    "two objects": (b'{"text": "a", "labels": []} {}', "not valid JSON"),
    "raw control character": (b'{"text": "a\x01", "labels": []}', "not valid JSON"),
    "a list": (b"[1, 2]", "holds a list"),
    "a string": (b'"text"', "holds a string"),
    "null": (b"null", "holds null"),
    "nesting bomb": (b'{"text": "a", "labels": ' + b"[" * 200_000, "nested too deeply"),
    "huge number": (b'{"text": ' + b"9" * 5000 + b"}", "digits"),
    "latin-1": ('{"text": "café", "labels": ["b"]}'.encode("latin-1"), "not UTF-8 (byte 0xe9 at byte 14"),
    "utf-16": ('{"text": "a", "labels": ["b"]}'.encode("utf-16"), "not UTF-8"),
    "text missing": (b'{"title": "a", "labels": ["b"]}', "field 'text' is missing (fields of the line: 'title'"),
    "text null": (b'{"text": null, "labels": ["b"]}', "field 'text' is null"),
    "text a number": (b'{"text": 3.5, "labels": ["b"]}', "field 'text' is a number"),
    "text a list": (b'{"text": ["a"], "labels": ["b"]}', "field 'text' is a list"),
    "text half a pair": (b'{"text": "a\\ud800", "labels": ["b"]}', "surrogate"),
    "labels missing": (b'{"text": "a", "label": ["b"]}', "choose another with --label-field"),
    "labels an object": (b'{"text": "a", "labels": {"b": 1}}', "field 'labels' is an object"),
    "label a number": (b'{"text": "a", "labels": ["b", 7]}', "label 2 in field 'labels' is a number"),
    "label a boolean": (b'{"text": "a", "labels": [true]}', "label 1 in field 'labels' is a boolean"),
    "label empty": (b'{"text": "a", "labels": ["b", ""]}', "label 2 is empty"),
    "label long": (b'{"text": "a", "labels": ["' + b"b" * 4097 + b'"]}', "longer than 4096 bytes"),
    "label long in bytes": (f'{{"text": "a", "labels": ["{"é" * 2049}"]}}'.encode(), "longer than 4096 bytes"),
    "label half a pair": (b'{"text": "a", "labels": ["\\udfff"]}', "surrogate"),
    "a field twice": (b'{"text": "a", "text": "b", "labels": ["b"]}', "occurs twice"),
    "blank line": (b"", "the line is blank"),
    "blank line of spaces": (b"  \t", "the line is blank"),
}

# Per format: files by name (the first is converted), line of the refusal (0: none), and what it says.
Case = tuple[dict[str, bytes], int, str]

CSV_HEAD = b"text,labels\nfirst,a;b\n"
TSV_HEAD = b"text\tlabels\nfirst\ta;b\n"
XC_JSON = b'{"title": "first", "target_ind": [0]}\n'
LBL = {"lbl.json": b'{"title": "a"}\n{"title": "b"}\n'}
SUBJECT = b'{"text": "first", "subjects": [{"uri": "a"}]}\n'
XC_BOW = b"2 4 3\n0,2 1:0.5 3:1\n"

CSV: dict[str, Case] = {
    "empty": ({"t.csv": b""}, 1, "is empty"),
    "no such text column": ({"t.csv": b"title,labels\nx,a\n"}, 1, "field 'text' is missing (the first line names"),
    "no such label column": ({"t.csv": b"text,tags\nx,a\n"}, 1, "choose another with --label-field"),
    "a column twice": ({"t.csv": b"text,text,labels\nx,y,a\n"}, 1, "field 'text' occurs twice"),
    "a field too many": ({"t.csv": CSV_HEAD + b"x,a,b\n"}, 3, "has 3 fields where the header names 2"),
    "a field too few": ({"t.csv": CSV_HEAD + b"x\n"}, 3, "has 1 fields"),
    "open quote": ({"t.csv": CSV_HEAD + b'"x,a\ny,b\n'}, 3, "opened and not closed"),
    "quote inside": ({"t.csv": CSV_HEAD + b'5" nail,a\ny" z,b\n'}, 3, "not valid CSV"),
    "text behind a quote": ({"t.csv": CSV_HEAD + b'"x"y,a\n'}, 3, "not valid CSV"),
    "latin-1": ({"t.csv": CSV_HEAD + "é,a\n".encode("latin-1")}, 3, "not UTF-8"),
    "blank line": ({"t.csv": CSV_HEAD + b"\nx,a\n"}, 3, "the line is blank"),
    "empty label": ({"t.csv": CSV_HEAD + b"x,a;;b\n"}, 3, "label 2 is empty"),
    "list cut off": ({"t.csv": CSV_HEAD + b'x,"[""a"""\n'}, 3, "begins like a JSON list"),
    "list of lists": ({"t.csv": CSV_HEAD + b"x,[[1]]\n"}, 3, "label 1 in field 'labels' is a list"),
}
TSV: dict[str, Case] = {
    "empty": ({"t.tsv": b""}, 1, "is empty"),
    "no such text column": ({"t.tsv": b"title\tlabels\nx\ta\n"}, 1, "field 'text' is missing"),
    "no such label column": ({"t.tsv": b"text\ttags\nx\ta\n"}, 1, "--label-field"),
    "a field too many": ({"t.tsv": TSV_HEAD + b"x\ta\tb\n"}, 3, "has 3 fields"),
    "a field too few": ({"t.tsv": TSV_HEAD + b"x\n"}, 3, "has 1 fields"),
    "latin-1": ({"t.tsv": TSV_HEAD + "é\ta\n".encode("latin-1")}, 3, "not UTF-8"),
    "blank line": ({"t.tsv": TSV_HEAD + b"\nx\ta\n"}, 3, "the line is blank"),
    "empty label": ({"t.tsv": TSV_HEAD + b"x\ta;\n"}, 3, "label 2 is empty"),
    "long label": ({"t.tsv": TSV_HEAD + b"x\t" + b"a" * 5000 + b"\n"}, 3, "longer than 4096 bytes"),
    "a number in a list": ({"t.tsv": TSV_HEAD + b'x\t["a", 1.5]\n'}, 3, "label 2 in field 'labels' is a number"),
}
XCJSON: dict[str, Case] = {
    "not json": ({"trn.json": XC_JSON + b"hello\n"}, 2, "not valid JSON"),
    "cut off": ({"trn.json": XC_JSON + XC_JSON[:-5]}, 2, "not valid JSON"),
    "no title": ({"trn.json": XC_JSON + b'{"target_ind": [0]}\n'}, 2, "field 'title' is missing"),
    "title null": ({"trn.json": XC_JSON + b'{"title": null, "target_ind": [0]}\n'}, 2, "field 'title' is null"),
    "content a number": (
        {"trn.json": XC_JSON + b'{"title": "x", "content": 1, "target_ind": [0]}\n'},
        2,
        "field 'content' is a number",
    ),
    "no labels": ({"trn.json": XC_JSON + b'{"title": "x"}\n'}, 2, "field 'target_ind' is missing"),
    "labels strings": ({"trn.json": XC_JSON + b'{"title": "x", "target_ind": ["0"]}\n'}, 2, "list of label ids"),
    "label negative": ({"trn.json": XC_JSON + b'{"title": "x", "target_ind": [-1]}\n'}, 2, "label id -1 is not"),
    "label past the list": (
        {"trn.json": XC_JSON + b'{"title": "x", "target_ind": [2]}\n'} | LBL,
        2,
        "label id 2 is not in 0...1",
    ),
    "relevances too few": (
        {"trn.json": XC_JSON + b'{"title": "x", "target_ind": [0, 1], "target_rel": [1.0]}\n'},
        2,
        "not a list of 2 numbers",
    ),
    "relevance not finite": (
        {"trn.json": XC_JSON + b'{"title": "x", "target_ind": [0], "target_rel": [NaN]}\n'},
        2,
        "'target_rel'",
    ),
    "relevance of 400 digits below 0": (
        {"trn.json": XC_JSON + b'{"title": "x", "target_ind": [0], "target_rel": [-' + b"9" * 400 + b"]}\n"},
        2,
        "'target_rel'",
    ),
    "label text half a pair": (
        {"trn.json": XC_JSON, "lbl.json": b'{"title": "a"}\n{"title": "b", "content": "\\ud800"}\n'},
        2,
        "surrogate",
    ),
}
XCTEXT: dict[str, Case] = {
    "no label file": ({"trn_X.txt": b"a\n"}, 0, "no file with its labels"),
    "rows too many": ({"trn_X.txt": b"a\nb\n", "trn_X_Y.txt": b"2 3\n0:1\n1:1\n2:1\n"}, 0, "3 lines follow"),
    "rows too few": ({"trn_X.txt": b"a\nb\nc\n", "trn_X_Y.txt": b"3 3\n0:1\n"}, 0, "rows of one another"),
    "other header": ({"trn_X.txt": b"a\nb\n", "trn_X_Y.txt": b"5 3\n0:1\n1:1\n"}, 0, "header names 5 rows"),
    "label past the header": ({"trn_X.txt": b"a\nb\n", "trn_X_Y.txt": b"2 3\n0:1\n3:1\n"}, 3, "3 is not in 0...2"),
    "label negative": ({"trn_X.txt": b"a\nb\n", "trn_X_Y.txt": b"2 3\n-1:1\n1:1\n"}, 2, "-1 is not in 0...2"),
    "not sparse": ({"trn_X.txt": b"a\nb\n", "trn_X_Y.txt": b"2 3\n0:1\none:1\n"}, 3, "'one:1' is not 'index:value'"),
    "value not finite": ({"trn_X.txt": b"a\nb\n", "trn_X_Y.txt": b"2 3\n0:inf\n1:1\n"}, 2, "not finite"),
    "value no number": ({"trn_X.txt": b"a\nb\n", "trn_X_Y.txt": b"2 3\n0:x\n1:1\n"}, 2, "is not 'index:value'"),
    "names of another length": (
        {"trn_X.txt": b"a\nb\n", "trn_X_Y.txt": b"2 3\n0:1\n1:1\n", "Y.txt": b"one\ntwo\n"},
        0,
        "the list of their names has 2",
    ),
    "name too long": (
        {"trn_X.txt": b"a\n", "trn_X_Y.txt": b"1 2\n0:1\n", "Y.txt": b"one\n" + b"x" * 5000 + b"\n"},
        2,
        "longer than 4096 bytes",
    ),
}
XCBOW: dict[str, Case] = {
    "no header": ({"train.txt": b"0,2 1:0.5\n"}, 0, "no file with its labels"),
    "rows too few": ({"train.txt": b"3 4 3\n0 1:1\n"}, 1, "names 3 rows, but 1 lines follow"),
    "rows too many": ({"train.txt": XC_BOW + b"1 0:1\n2 0:1\n"}, 4, "the header names 2 rows"),
    "feature past the header": ({"train.txt": XC_BOW + b"1 4:1\n"}, 3, "index 4 is not in 0...3"),
    "label past the header": ({"train.txt": XC_BOW + b"3 1:1\n"}, 3, "label id 3 is not in 0...2"),
    "no blank before features": ({"train.txt": XC_BOW + b"1:1 2:1\n"}, 3, "a blank where a row has no label"),
    "label no number": ({"train.txt": XC_BOW + b"a 1:1\n"}, 3, "expected label ids"),
    "weight no number": ({"train.txt": XC_BOW + b"1 1:x\n"}, 3, "is not 'index:value'"),
    "weight not finite": ({"train.txt": XC_BOW + b"1 1:1e39\n"}, 3, "not finite"),
    "index huge": ({"train.txt": XC_BOW + b"1 99999999999999999999:1\n"}, 3, "is not 'index:value'"),
    "no rows at all": ({"train.txt": b"0 5 3\n"}, 0, "no usable instance"),
    "no features at all": ({"train.txt": b"1 0 3\n1 0:1\n"}, 1, "not a header"),
    "no label file": ({"trn_X_Xf.txt": b"1 4\n0:1\n"}, 0, "no file with its labels"),
}
ANNIF: dict[str, Case] = {
    "no tab": ({"t.tsv": b"first\t<http://a>\nsecond <http://a>\n"}, 2, "no tab in the line"),
    "latin-1": ({"t.tsv": b"first\t<http://a>\n" + "é\t<http://a>\n".encode("latin-1")}, 2, "not UTF-8"),
    "blank": ({"t.tsv": b"first\t<http://a>\n\nsecond\t<http://a>\n"}, 2, "the line is blank"),
    "empty uri": ({"t.tsv": b"first\t<http://a>\nsecond\t<>\n"}, 2, "label 1 is empty"),
    "long uri": ({"t.tsv": b"first\t<http://a>\nsecond\t<" + b"a" * 5000 + b">\n"}, 2, "longer than 4096"),
    "not json": ({"t.jsonl": SUBJECT + b"hello\n"}, 2, "not valid JSON"),
    "no subjects": ({"t.jsonl": SUBJECT + b'{"text": "b"}\n'}, 2, "field 'subjects' is missing"),
    "subjects a string": (
        {"t.jsonl": SUBJECT + b'{"text": "a", "subjects": "b"}\n'},
        2,
        "is a string; expected a list",
    ),
    "subject a string": (
        {"t.jsonl": SUBJECT + b'{"text": "a", "subjects": ["b"]}\n'},
        2,
        "subject 1 in field 'subjects'",
    ),
    "subject without a name": ({"t.jsonl": b'{"text": "a", "subjects": [{"x": 1}]}\n'}, 1, "'uri' or 'label'"),
    "no text": ({"t.jsonl": SUBJECT + b'{"title": "a", "subjects": []}\n'}, 2, "field 'text' is missing"),
}
TEXT_FORMATS = {
    f"{format}: {name}": case
    for format, cases in {
        "csv": CSV, "tsv": TSV, "xc-json": XCJSON, "xc-text": XCTEXT, "xc-bow": XCBOW, "annif": ANNIF
    }.items()
    for name, case in cases.items()
}  # fmt: skip

X = scipy.sparse.csr_matrix(np.array([[0, 0.5, 0], [2, 0, -1]], dtype=np.float32))
Y = scipy.sparse.csr_matrix(np.array([[1, 0], [1, 1]]))


def parquet(columns: dict[str, object]) -> bytes:
    stream = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), stream)
    return stream.getvalue()


def parquet_of_pairs(columns: list[tuple[str, list[object]]]) -> bytes:
    stream = io.BytesIO()
    names = [name for name, _ in columns]
    pyarrow.parquet.write_table(pyarrow.Table.from_arrays([pyarrow.array(each) for _, each in columns], names), stream)
    return stream.getvalue()


GOOD_TABLE = {"text": ["a", "b"], "labels": [["x"], ["y", "z"]]}
GOOD_PARQUET = parquet(GOOD_TABLE)
BAD_PARQUET = {
    "not parquet": (b"text,labels\n", "not a whole Parquet file"),
    "cut": (GOOD_PARQUET[:-20], "not a whole Parquet file"),
    "magic alone": (b"PAR1PAR1", "not a whole Parquet file"),
    "damaged footer": (GOOD_PARQUET[:-60] + b"\xff" * 40 + GOOD_PARQUET[-20:], "not a whole Parquet file"),
    "a column twice": (parquet_of_pairs([("text", ["a"]), ("text", ["b"]), ("labels", [["x"]])]), "occurs twice"),
    "no text": (parquet({"title": ["a"], "labels": [["x"]]}), "field 'text' is missing (fields: 'title'"),
    "no labels": (parquet({"text": ["a"], "tags": [["x"]]}), "choose another with --label-field"),
    "text of numbers": (parquet({"text": [1, 2], "labels": [["x"], ["y"]]}), "field 'text' holds int64"),
    "text of bytes": (parquet({"text": [b"a"], "labels": [["x"]]}), "field 'text' holds binary"),
    "labels of floats": (parquet({"text": ["a"], "labels": [[0.5]]}), "field 'labels' holds double"),
    "labels of structs": (parquet({"text": ["a"], "labels": [{"a": 1}]}), "field 'labels' holds struct"),
    "null text": (parquet({"text": ["a", None], "labels": [["x"], ["y"]]}), "row 1: field 'text' is null"),
    "null labels": (parquet({"text": ["a", "b"], "labels": [["x"], None]}), "row 1: field 'labels' is null"),
    "null label": (parquet({"text": ["a", "b"], "labels": [["x"], ["y", None]]}), "row 1: label 2"),
    "empty label": (parquet({"text": ["a", "b"], "labels": [["x"], [""]]}), "row 1: label 1 is empty"),
}


def npz(matrix: scipy.sparse.csr_matrix = X, **arrays: object) -> bytes:
    """A matrix as scipy writes it, with some arrays exchanged; ``None`` leaves one out."""
    whole = {
        "data": matrix.data,
        "indices": matrix.indices,
        "indptr": matrix.indptr,
        "shape": np.array(matrix.shape),
        "format": np.array(b"csr"),
    } | arrays
    stream = io.BytesIO()
    np.savez_compressed(stream, **{name: array for name, array in whole.items() if array is not None})
    return stream.getvalue()


def repacked(archive: bytes, method: int) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as old, zipfile.ZipFile(stream, "w", method) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    return stream.getvalue()


BAD_NPZ = {
    "packed by bzip2": (repacked(npz(), zipfile.ZIP_BZIP2), "in another way than scipy and numpy"),
    "no archive": (b"hello", "not a whole .npz archive"),
    "cut": (npz()[:-30], "not a whole .npz archive"),
    "other arrays": (npz(indptr=None), "has no array 'indptr'"),
    "csc": (npz(format=np.array(b"csc")), "not in CSR form"),
    "objects": (npz(data=np.array([{}, {}, {}], dtype=object)), "array 'data' cannot be read"),
    "indptr too short": (npz(indptr=np.array([0, 3])), "indptr does not lead from 0 to 3 in 2 rows"),
    "indptr past the end": (npz(indptr=np.array([0, 1, 4])), "indptr does not lead"),
    "indptr falls": (npz(indptr=np.array([0, 5, 3])), "row 1: indptr falls"),
    "index past the shape": (npz(indices=np.array([1, 0, 3])), "row 1: index 3 is not in 0...2"),
    "index negative": (npz(indices=np.array([1, 0, -1])), "row 1: index -1 is not"),
    "data too short": (npz(data=np.ones(2, np.float32)), "holds 3 indices and 2 values"),
    "data complex": (npz(data=np.ones(3, complex)), "values of type complex128"),
    "value not finite": (npz(data=np.array([1, np.nan, 1])), "row 1: a value is not finite"),
    "shape huge": (npz(shape=np.array([2, 1 << 40])), "is out of range"),
    "shape of one": (npz(shape=np.array([2])), "not lists of whole numbers"),
    "rows of other labels": (npz(scipy.sparse.csr_matrix((3, 3))), "rows of one another"),
}

BIG_ZEROS = b"\0" * 16
ODD: dict[str, Case] = {
    "jsonl: an empty file": ({"t.jsonl": b""}, 0, "no usable instance"),
    "jsonl: a byte order mark alone": ({"t.jsonl": b"\xef\xbb\xbf"}, 1, "is blank"),
    "jsonl: a byte order mark inside": ({"t.jsonl": GOOD + b"\xef\xbb\xbf" + GOOD}, 2, "not valid JSON"),
    "jsonl: NUL bytes": ({"t.jsonl": GOOD + BIG_ZEROS + b"\n"}, 2, "not valid JSON"),
    "jsonl: an infinite label": ({"t.jsonl": GOOD + b'{"text": "a", "labels": [Infinity]}\n'}, 2, "label 1"),
    "jsonl: a negative label": ({"t.jsonl": GOOD + b'{"text": "a", "labels": [-1]}\n'}, 2, "-1"),
    "csv: NUL bytes": ({"t.csv": CSV_HEAD + BIG_ZEROS + b"\n"}, 3, "field"),
    "csv: a header alone in quotes": ({"t.csv": b'"text,labels\n'}, 1, "quote"),
    "tsv: NUL bytes": ({"t.tsv": TSV_HEAD + BIG_ZEROS + b"\n"}, 3, "field"),
    "xc-bow: a header of floats": ({"train.txt": b"2.0 4.0 3.0\n0 1:1\n1 1:1\n"}, 0, "train.txt"),
    "xc-bow: a label of a trillion": ({"train.txt": XC_BOW + b"1000000000000 1:1\n"}, 3, "is not in 0...2"),
    "xc-bow: a negative feature": ({"train.txt": XC_BOW + b"1 -1:1\n"}, 3, "-1"),
    "xc-bow: NaN": ({"train.txt": XC_BOW + b"1 1:nan\n"}, 3, "not finite"),
    "xc-text: an empty file": ({"trn_X.txt": b"", "trn_X_Y.txt": b""}, 0, "no usable instance"),
    "xc-json: a label of 5,000 digits": (
        {"trn.json": XC_JSON + b'{"title": "x", "target_ind": [' + b"9" * 5000 + b"]}\n"}, 2, "digits"
    ),
}  # fmt: skip


def _with_good_lines(line: bytes) -> dict[str, bytes]:
    return {"t.jsonl": GOOD * 2 + line + b"\n" + GOOD}


def _matrices() -> dict[str, bytes]:
    return {"Y.trn.npz": npz(Y)}


ALL: dict[str, Case] = {
    **{f"jsonl: {name}": (_with_good_lines(line), 3, says) for name, (line, says) in MALFORMED.items()},
    **TEXT_FORMATS,
    **{f"parquet: {name}": ({"t.parquet": content}, 0, says) for name, (content, says) in BAD_PARQUET.items()},
    **{f"npz: {name}": ({"X.trn.npz": content, **_matrices()}, 0, says) for name, (content, says) in BAD_NPZ.items()},
    **ODD,
}
