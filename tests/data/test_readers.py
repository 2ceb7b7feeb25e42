"""Bad input is refused with file and line and leaves no store behind; odd but valid input is read."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elmo_stream.data.readers import read_part, split_source
from elmo_stream.data.readers.detect import open_source
from elmo_stream.data.readers.instance import MAX_LINE_BYTES, Fields
from elmo_stream.data.shard import convert
from elmo_stream.errors import UserError
from tests.data.readers.bad_files import GOOD, MALFORMED


@pytest.mark.parametrize(("line", "says"), MALFORMED.values(), ids=MALFORMED.keys())
def test_a_malformed_line_is_refused_with_its_file_and_number_and_leaves_no_store(tmp_path, line, says):
    path = tmp_path / "train.jsonl"
    path.write_bytes(GOOD * 40 + line + b"\n" + GOOD * 40)
    with pytest.raises(UserError) as caught:
        convert([path], tmp_path / "store", tokenizer="train:64", workers=1, part_bytes=500)
    assert str(caught.value).startswith(f"{path}:41: ") and says in str(caught.value)
    assert not (tmp_path / "store").exists()


def test_a_malformed_line_found_by_a_worker_process_is_refused_alike(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_bytes(GOOD * 40 + b"{}\n" + GOOD * 40 + b"[]\n")
    with pytest.raises(UserError, match=r"train\.jsonl:41: field 'text' is missing"):
        convert([path], tmp_path / "store", tokenizer="train:64", workers=2, part_bytes=500)
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("part_bytes", [1 << 20, 1 << 30])
def test_a_line_without_end_is_refused_before_it_fills_the_memory(tmp_path, part_bytes):
    path = tmp_path / "train.jsonl"
    with open(path, "wb") as stream:
        stream.write(GOOD * 2)
        stream.truncate(MAX_LINE_BYTES + (1 << 20))
    with pytest.raises(UserError, match=r"train\.jsonl:3: the line is longer than 64 MiB"):
        read_all(path, part_bytes)


def test_files_that_no_reader_understands_are_refused(tmp_path):
    for name, says in (("a.doc", "'.doc'"), ("a.jsonl.gz", "first bytes are not"), ("missing.jsonl", "no such file")):
        if name != "missing.jsonl":
            (tmp_path / name).write_bytes(GOOD)
        with pytest.raises(UserError, match=says):
            convert([tmp_path / name], tmp_path / "store")
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(UserError, match="not a regular file"):
        convert([tmp_path / "folder.jsonl"], tmp_path / "store")
    with pytest.raises(UserError, match="no training file"):
        convert([], tmp_path / "store")


DEFAULT = Fields()


def read_all(path: Path, part_bytes: int, fields: Fields = DEFAULT) -> list[tuple[str, tuple[str, ...]]]:
    parts = split_source(open_source(path, "jsonl")[0], fields, part_bytes)
    return [(one.text, one.labels) for part in parts for one in read_part(part, fields)]


def test_line_breaks_of_unicode_and_of_windows_do_not_shift_rows(tmp_path):
    path = tmp_path / "train.jsonl"
    texts = ["a\u2028b", "c\u0085d", "e\x0bf", "g\rh", "", "i"]
    lines = [json.dumps({"text": text, "labels": [text + "!"]}, ensure_ascii=False) for text in texts]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode() + b"\r\n\n  \r\n")
    assert read_all(path, 10) == read_all(path, 1 << 20) == [(text, (text + "!",)) for text in texts]


def test_texts_can_be_read_without_labels(tmp_path):
    path = tmp_path / "input.jsonl"
    path.write_text('{"text": "a", "title": "b"}\n')
    assert read_all(path, 100, Fields(text=("title", "text"), label=None)) == [("b a", ())]


@settings(max_examples=30, deadline=None)
@given(
    rows=st.lists(st.tuples(st.text(max_size=30), st.lists(st.text(min_size=1, max_size=5), max_size=4)), max_size=20),
    part_bytes=st.integers(1, 400),
    last_newline=st.booleans(),
)
def test_any_cut_into_parts_reads_every_instance_once_and_in_order(tmp_path_factory, rows, part_bytes, last_newline):
    path = tmp_path_factory.mktemp("parts") / "train.jsonl"
    lines = [json.dumps({"text": text, "labels": labels}) for text, labels in rows]
    path.write_text("\n".join(lines) + ("\n" if last_newline and lines else ""))
    assert read_all(path, part_bytes) == [(text, tuple(dict.fromkeys(labels))) for text, labels in rows]
