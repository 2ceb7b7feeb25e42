"""Labels given as ids keep their identity whatever their names are, and filters reach the metrics."""

import json
from pathlib import Path

import numpy as np
import pytest

from elmo_stream.data.filters import load_filter
from elmo_stream.data.index import StoreIndex
from elmo_stream.data.labels import LabelNames
from elmo_stream.data.readers.detect import open_source
from elmo_stream.data.rows import LabelNameRows
from elmo_stream.data.shard import convert
from elmo_stream.data.store import open_store
from elmo_stream.data.tokenize import Tokenizer
from elmo_stream.errors import UserError

TRAIN = [("red shoes", [0, 2]), ("blue shoes", [2, 3]), ("a book", [1]), ("red book", [1, 2])]
TITLES = [("Shoes", "to walk"), ("Books", ""), ("Shoes", "to run"), ("", "nameless"), ("Unseen", "x")]


def write(folder: Path) -> Path:
    lines = [json.dumps({"title": text, "content": "", "target_ind": labels}) for text, labels in TRAIN]
    (folder / "trn.json").write_text("\n".join(lines) + "\n")
    lines = [json.dumps({"uid": "B0", "title": title, "content": content}) for title, content in TITLES]
    (folder / "lbl.json").write_text("\n".join(lines) + "\n")
    return folder / "trn.json"


def test_labels_of_one_name_stay_two_labels_and_keep_their_texts(tmp_path):
    notes: list[str] = []
    train = write(tmp_path)
    convert([train], tmp_path / "store", tokenizer="train:64", workers=1, report=notes.append)
    labels = LabelNames(tmp_path / "store" / "labels")
    names = labels[range(len(labels))]
    assert sorted(names) == ["#3", "Books", "Shoes #0", "Shoes #2"]
    texts = labels.texts(range(len(labels)))
    assert texts is not None and dict(zip(names, texts, strict=True)) == {
        "#3": "nameless",
        "Books": "Books",
        "Shoes #0": "Shoes to walk",
        "Shoes #2": "Shoes to run",
    }
    assert any("3 labels have no name or share one" in note for note in notes)


def test_a_label_without_a_text_is_trained_on_by_its_name(tmp_path):
    train = write(tmp_path)
    (tmp_path / "lbl.json").write_text('{"title": "Shoes"}\n' + '{"title": ""}\n' * 3)
    convert([train], tmp_path / "store", tokenizer="train:64", workers=1)
    rows = LabelNameRows(tmp_path / "store", seed=0).read_between(0, 4)
    names = LabelNames(tmp_path / "store" / "labels")[rows.labels]
    expected, offsets, _ = Tokenizer.load(tmp_path / "store" / "tokenizer").encode_batch(names)
    assert sorted(names) == ["#1", "#2", "#3", "Shoes"]
    assert (rows.tokens.tolist(), rows.token_offsets.tolist()) == (expected.tolist(), offsets.tolist())


@pytest.mark.parametrize("ending", ["json", "csv"])
def test_names_can_be_given_for_ids_of_any_format(tmp_path, ending):
    (tmp_path / "names.txt").write_text("zero\none\ntwo\n")
    content = {"json": '{"text": "a", "labels": [2, 0]}\n', "csv": "text,labels\na,2 0\n"}[ending]
    (tmp_path / f"t.{ending}").write_text(content)
    convert([tmp_path / f"t.{ending}"], tmp_path / "s", labels=tmp_path / "names.txt", tokenizer="train:64", workers=1)
    assert sorted(LabelNames(tmp_path / "s" / "labels")[[0, 1]]) == ["two", "zero"]


def test_strings_where_ids_were_promised_are_refused(tmp_path):
    (tmp_path / "names.txt").write_text("zero\none\n")
    (tmp_path / "t.jsonl").write_text('{"text": "a", "labels": ["one"]}\n')
    with pytest.raises(UserError, match=r"t\.jsonl:1: field 'labels' holds 'one' where an id was expected"):
        convert([tmp_path / "t.jsonl"], tmp_path / "s", labels=tmp_path / "names.txt", workers=1)


def shard_with_filter(folder: Path, content: str, notes: list[str]) -> Path:
    train, out = write(folder), folder / "store"
    (folder / "filter.txt").write_text(content)
    options = {"tokenizer": "train:64", "workers": 1, "filter": folder / "filter.txt", "report": notes.append}
    convert([train], out, test=[train], **options)
    return out


def test_pairs_of_a_filter_are_kept_under_the_ids_of_the_store(tmp_path):
    notes: list[str] = []
    store = shard_with_filter(tmp_path, "0 2\n3 1\n\n3 1\n1 4\n", notes)
    index = StoreIndex.load(store)
    index.verify(store)
    pairs = load_filter(store, index, "test")
    names = LabelNames(store / "labels")
    assert list(zip(pairs.row_P.tolist(), names[pairs.label_P], strict=True)) == [(0, "Shoes #2"), (3, "Books")]
    assert load_filter(store, index, "train").row_P.size == 0
    assert any("2 pairs kept, 1 of labels unknown to training" in note for note in notes)


def test_an_empty_filter_is_no_filter(tmp_path):
    store = shard_with_filter(tmp_path, "", [])
    assert load_filter(store, StoreIndex.load(store), "test").row_P.size == 0


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("0 2\n0\n", ":2: expected two numbers"),
        ("0 2\n0 1 2\n", ":2: expected two numbers"),
        ("a b\n", ":1: expected two numbers"),
        ("0,2\n", ":1: expected two numbers"),
        ("-1 2\n", ":1: expected two numbers"),
        ("0 99999999999999999999\n", ":1: expected two numbers"),
        ("4 2\n", ":1: row 4 is not in 0...3"),
        ("0 5\n", "label 5, but the list of labels ends with 4"),
        ("0 4\n", "training knows none of its labels"),
    ],
)
def test_a_malformed_filter_is_refused(tmp_path, content, says):
    with pytest.raises(UserError) as caught:
        shard_with_filter(tmp_path, content, [])
    assert str(caught.value).startswith(str(tmp_path / "filter.txt")) and says in str(caught.value)
    assert not (tmp_path / "store").exists()


def test_weights_of_features_reach_the_store(tmp_path):
    (tmp_path / "train.txt").write_text("3 4 2\n0 1:0.5 3:-2\n 0:1\n1,0 2:0.25\n")
    convert([tmp_path / "train.txt"], tmp_path / "s", test=[tmp_path / "train.txt"], workers=1)
    store, index = open_store(tmp_path / "s"), StoreIndex.load(tmp_path / "s")
    assert (index.splits["train"].dropped, index.tokenizer.vocab_size) == ({"no labels": 1}, 5)
    shard = store.read_shard("test", index.splits["test"].shards[0])
    assert shard.token_weights is not None
    assert (shard.tokens.tolist(), shard.token_offsets.tolist()) == ([1, 3, 0, 2], [0, 2, 3, 4])
    np.testing.assert_array_equal(shard.token_weights, np.array([0.5, -2, 1, 0.25], np.float32))


@pytest.mark.parametrize("header", ["3 4 2", "3 4"])
def test_a_last_row_that_is_empty_and_has_no_line_end_is_a_row(tmp_path, header):
    labels = ["0 ", "1 "] if header.endswith("2") else ["", ""]
    path = tmp_path / "tst_X_Xf.txt"
    path.write_text(f"{header}\n{labels[0]}1:0.5\n{labels[1]}2:1\n")
    (tmp_path / "tst_X_Y.txt").write_text("3 2\n0:1\n1:1\n0:1\n")
    convert([path], tmp_path / "s", test=[path], workers=1)
    assert StoreIndex.load(tmp_path / "s").splits["test"].instances == 3


def test_a_byte_order_mark_before_a_header_of_two_numbers_does_not_lose_the_labels(tmp_path):
    (tmp_path / "trn_X_Xf.txt").write_bytes(b"\xef\xbb\xbf2 4\n1:0.5\n2:1\n")
    (tmp_path / "trn_X_Y.txt").write_text("2 2\n0:1\n1:1\n")
    convert([tmp_path / "trn_X_Xf.txt"], tmp_path / "s", workers=1)
    assert StoreIndex.load(tmp_path / "s").splits["train"].positives == 2


def test_a_row_of_features_with_a_comment_is_looked_at_in_no_time(tmp_path):
    row = " ".join(f"{number}:0.5" for number in range(100_000, 100_060))
    (tmp_path / "t.txt").write_text(f"1 200000 3\n0 {row} #comment\n")
    source, _ = open_source(tmp_path / "t.txt", "auto", labeled=False)  # a minute for every two entries more, once
    assert source.format == "xc-text"


def test_texts_named_as_in_the_contract_find_their_labels(tmp_path):
    (tmp_path / "X.txt").write_text("a\nb\n")
    (tmp_path / "X_Y.txt").write_text("2 2\n0:1\n1:1\n")
    convert([tmp_path / "X.txt"], tmp_path / "s", tokenizer="train:64", workers=1)
    assert StoreIndex.load(tmp_path / "s").splits["train"].positives == 2


@pytest.mark.parametrize("ending", ["csv", "tsv"])
def test_the_separator_of_labels_is_seen_in_a_file_of_one_row_without_line_end(tmp_path, ending):
    between = {"csv": ",", "tsv": "\t"}[ending]
    (tmp_path / f"t.{ending}").write_text(f"text{between}labels\nfoo{between}a;b")
    convert([tmp_path / f"t.{ending}"], tmp_path / "s", tokenizer="train:64", workers=1)
    assert sorted(LabelNames(tmp_path / "s" / "labels")[[0, 1]]) == ["a", "b"]


@pytest.mark.parametrize(("content", "expected"), [("2 2\n0:1\n1:1\n", ["one", "two"]), ("a\nb\n", ["a", "b"])])
def test_a_list_of_names_is_for_labels_that_are_ids_however_their_file_is_named(tmp_path, content, expected):
    (tmp_path / "X.txt").write_text("a\nb\n")
    (tmp_path / "labels.txt").write_text(content)
    (tmp_path / "Y.txt").write_text("one\ntwo\n")
    convert([tmp_path / "X.txt"], tmp_path / "s", tokenizer="train:64", workers=1)
    assert sorted(LabelNames(tmp_path / "s" / "labels")[[0, 1]]) == expected


def test_names_of_labels_in_latin_1_are_read_and_the_user_is_told(tmp_path):
    notes: list[str] = []
    (tmp_path / "trn_X.txt").write_text("a\nb\n")
    (tmp_path / "trn_X_Y.txt").write_text("2 2\n0:1\n1:1\n")
    (tmp_path / "Y.txt").write_bytes("café\nthé\n".encode("latin-1"))
    convert([tmp_path / "trn_X.txt"], tmp_path / "s", tokenizer="train:64", workers=1, report=notes.append)
    assert sorted(LabelNames(tmp_path / "s" / "labels")[[0, 1]]) == ["café", "thé"]
    assert any("Y.txt: is not UTF-8" in note for note in notes)


def test_a_list_of_strings_named_subjects_is_no_corpus_of_annif(tmp_path):
    (tmp_path / "t.jsonl").write_text('{"text": "a", "subjects": ["x y", "z"]}\n')
    convert([tmp_path / "t.jsonl"], tmp_path / "s", label_field="subjects", tokenizer="train:64", workers=1)
    assert sorted(LabelNames(tmp_path / "s" / "labels")[[0, 1]]) == ["x y", "z"]


def test_texts_in_latin_1_are_read_and_the_user_is_told(tmp_path):
    notes: list[str] = []
    (tmp_path / "trn_X.txt").write_bytes("na\x00ïve\ncafé\u0085\n".encode("latin-1"))
    (tmp_path / "trn_X_Y.txt").write_text("2 2\n0:1 1:0\n1:1\n")
    convert([tmp_path / "trn_X.txt"], tmp_path / "s", tokenizer="train:64", workers=1, report=notes.append)
    assert any("read as Latin-1" in note for note in notes)
    assert StoreIndex.load(tmp_path / "s").splits["train"].positives == 2  # the entry of value 0 is none


def test_a_label_file_beside_a_file_with_labels_is_refused_rather_than_ignored(tmp_path):
    (tmp_path / "train.txt").write_text("1 4 2\n0 1:0.5\n")
    (tmp_path / "y.txt").write_text("1 2\n1:1\n")
    with pytest.raises(UserError, match="holds its labels in itself"):
        convert([tmp_path / "train.txt"], tmp_path / "s", label_files=[tmp_path / "y.txt"], workers=1)
