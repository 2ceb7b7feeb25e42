"""A malformed file of any format is refused with its name and line, and leaves no store behind."""

from pathlib import Path

import pytest

from elmo_stream.data.shard import convert
from elmo_stream.errors import UserError

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
ALL = {
    f"{format}: {name}": case
    for format, cases in {
        "csv": CSV, "tsv": TSV, "xc-json": XCJSON, "xc-text": XCTEXT, "xc-bow": XCBOW, "annif": ANNIF
    }.items()
    for name, case in cases.items()
}  # fmt: skip


def refused(folder: Path, files: dict[str, bytes], **options: object) -> str:
    for name, content in files.items():
        (folder / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        convert([folder / next(iter(files))], folder / "store", workers=1, **{"tokenizer": None} | options)
    assert not (folder / "store").exists()
    return str(caught.value)


@pytest.mark.parametrize(("files", "line", "says"), ALL.values(), ids=ALL.keys())
def test_a_malformed_file_is_refused_with_its_line(tmp_path, files, line, says):
    message = refused(tmp_path, files)
    assert says in message and message.startswith(str(tmp_path)), message
    assert line == 0 or f":{line}: " in message, message
