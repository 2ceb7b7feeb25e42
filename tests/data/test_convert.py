"""What goes in as JSONL comes out of the store: every instance once, with its own tokens and label names."""

import json
import multiprocessing
import os
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from elmo_stream.data.index import StoreIndex
from elmo_stream.data.labels import LabelNames
from elmo_stream.data.shard import convert
from elmo_stream.data.store import open_store
from elmo_stream.data.tokenize import Tokenizer
from elmo_stream.errors import ElmoStreamError, LockedError, UserError


def instances(store, split):
    """(token ids, label names) of every row, in the order of the store."""
    names, reader = LabelNames(store / "labels"), open_store(store)
    found = []
    for entry in StoreIndex.load(store).splits[split].shards:
        shard = reader.read_shard(split, entry)
        for row in range(shard.rows):
            tokens = shard.tokens[shard.token_offsets[row] : shard.token_offsets[row + 1]]
            labels = shard.labels[shard.label_offsets[row] : shard.label_offsets[row + 1]]
            found.append((tuple(tokens.tolist()), frozenset(names[labels])))
    return found


def expected(store, rows, known):
    """The same, computed from the input a row at a time."""
    tokenizer = Tokenizer.load(store / "tokenizer")
    return [
        (tuple(tokenizer.encode_batch([row["text"]])[0].tolist()), frozenset(row["labels"]).intersection(known))
        for row in rows
    ]


@pytest.fixture(scope="module")
def kept(sample):
    return [row for row in sample.rows(sample.train) if row["text"].strip() and row["labels"]]


@pytest.fixture(scope="module")
def frequency(kept):
    return Counter(label for row in kept for label in set(row["labels"]))


@pytest.fixture(scope="module")
def store_of_another_seed(sample, tmp_path_factory):
    out = tmp_path_factory.mktemp("stores") / "another"
    sample.convert(out, seed=8)
    return out


class Stop(Exception):
    """Raised by a test in the middle of a conversion."""


def test_every_training_instance_is_in_the_store_exactly_once_with_its_own_labels(sample_store, kept, frequency):
    assert Counter(instances(sample_store, "train")) == Counter(expected(sample_store, kept, frequency))


def test_test_instances_keep_their_order_and_all_of_them_are_kept(sample_store, sample, frequency):
    assert instances(sample_store, "test") == expected(sample_store, sample.rows(sample.test), frequency)


def test_training_instances_are_shuffled_across_shards(sample_store, kept, frequency):
    in_order = {pair: place for place, pair in enumerate(expected(sample_store, kept, frequency))}
    places = np.array([in_order[pair] for pair in instances(sample_store, "train")])
    assert abs(np.corrcoef(places, np.arange(len(places)))[0, 1]) < 0.1
    assert all(np.ptp(part) > 0.9 * len(places) for part in np.array_split(places, 4))


def test_label_ids_follow_training_frequency_and_no_label_comes_from_the_test_split(sample_store, frequency):
    names = LabelNames(sample_store / "labels")
    listed = names[np.arange(len(names))]
    assert len(names) == len(frequency) == len(set(listed))
    assert [frequency[name] for name in listed] == names.frequency_L.tolist()
    assert np.all(np.diff(names.frequency_L.astype(int)) <= 0)


def test_everything_dropped_cut_merged_or_unknown_is_counted(sample_summary, sample, kept, frequency):
    store, summary = sample_summary
    test_rows = sample.rows(sample.test)
    assert summary["train"]["dropped"] == {"empty text": 2, "no labels": 1}
    assert summary["test"]["dropped"] == {}
    assert summary["train"]["instances"] == len(kept) and summary["test"]["instances"] == len(test_rows)
    repeated = sum(len(row["labels"]) - len(set(row["labels"])) for row in kept)
    assert summary["train"]["duplicate_labels"] == repeated > 0
    unseen = sum(label not in frequency for row in test_rows for label in set(row["labels"]))
    assert summary["test"]["unseen_labels"] == unseen > 0
    assert summary["train"]["unseen_labels"] == 0
    tokenizer = Tokenizer.load(store / "tokenizer")
    assert summary["train"]["truncated"] == sum(tokenizer.encode_batch([row["text"]])[2] for row in kept) > 0
    assert summary["labels"] == len(frequency)
    assert summary["train"]["shards"] == 4


@pytest.mark.parametrize("changes", [{"workers": 1}, {"part_bytes": 15_000}, {"part_bytes": 10**9}])
def test_the_bytes_of_the_store_depend_on_neither_workers_nor_parts(sample, sample_store, tree, tmp_path, changes):
    sample.convert(tmp_path / "other", **changes)
    assert tree(tmp_path / "other") == tree(sample_store)


def test_another_seed_gives_another_order_and_another_fingerprint(sample_store, store_of_another_seed):
    assert StoreIndex.load(store_of_another_seed).fingerprint != StoreIndex.load(sample_store).fingerprint
    assert instances(store_of_another_seed, "train") != instances(sample_store, "train")


def test_a_store_verifies_and_leaves_no_scratch(sample_store):
    StoreIndex.load(sample_store).verify(sample_store)
    assert {path.name for path in sample_store.iterdir()} == {"index.json", "labels", "tokenizer", "train", "test"}


def test_several_files_and_text_fields_make_one_split(tmp_path):
    rows = [{"a": f"title {i}", "b": "body", "tags": [f"tag {i % 3}"]} for i in range(20)]
    for name, part in (("one.json", rows[:8]), ("two.ndjson", rows[8:])):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\r\n" for row in part))
    summary = convert(
        [tmp_path / "one.json", tmp_path / "two.ndjson"],
        tmp_path / "store",
        text_fields=("a", "b"),
        label_field="tags",
        tokenizer="train:64",
        workers=1,
    )
    assert (summary["train"]["instances"], summary["labels"]) == (20, 3)
    texts = [{"text": f"{row['a']} {row['b']}", "labels": row["tags"]} for row in rows]
    found = instances(tmp_path / "store", "train")
    assert Counter(found) == Counter(expected(tmp_path / "store", texts, {"tag 0", "tag 1", "tag 2"}))


def test_a_finished_store_is_never_overwritten(sample, sample_store, tree):
    before = tree(sample_store)
    with pytest.raises(UserError, match="exists already"):
        sample.convert(sample_store)
    assert tree(sample_store) == before


def test_a_folder_with_files_of_the_user_is_refused_and_left_as_it_is(sample, tmp_path):
    (tmp_path / "photo.tmp-1").write_text("precious")
    with pytest.raises(UserError, match="files of no conversion"):
        sample.convert(tmp_path)
    assert (tmp_path / "photo.tmp-1").read_text() == "precious"


def test_a_bad_line_is_told_where_the_folder_of_the_store_is_a_link(tmp_path):
    (tmp_path / "t.jsonl").write_text("{}\n")
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    with pytest.raises(UserError, match=r"t\.jsonl:1: "):
        convert([tmp_path / "t.jsonl"], tmp_path / "link", workers=1)
    assert not list((tmp_path / "there").iterdir())


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names of files")
def test_names_of_files_need_not_be_utf_8(tmp_path):
    path = tmp_path / os.fsdecode(b"tr\xe4in.jsonl")
    path.write_text('{"text": "a", "labels": ["b"]}\n')
    convert([path], tmp_path / "s", tokenizer="train:64", workers=1)
    assert StoreIndex.load(tmp_path / "s").splits["train"].instances == 1


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"tokenizer": "train:many"}, "train:N"),
        ({"tokenizer": "no such folder"}, "no such folder"),
        ({"max_length": 0}, "--max-length 0"),
        ({"max_length": 100_000}, "--max-length 100000"),
        ({"rows_per_shard": 0}, "--rows-per-shard 0"),
        ({"workers": 0}, "--workers 0"),
        ({"seed": -1}, "--seed -1"),
        ({"store": "tar"}, "--store tar"),
        ({"format": "xls"}, "--format xls"),
        ({"propensity": (float("nan"), 1.5)}, "--propensity"),
        ({"text_fields": ()}, "--text-field"),
    ],
)
def test_a_wrong_option_is_named_and_nothing_is_left_behind(sample, tmp_path, changes, says):
    with pytest.raises(UserError, match=says):
        sample.convert(tmp_path / "store", **changes)
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("rows", [[], [{"text": "", "labels": ["a"]}], [{"text": "a", "labels": []}]])
def test_a_training_input_without_a_usable_instance_is_refused(tmp_path, rows):
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match="no usable instance"):
        convert([tmp_path / "train.jsonl"], tmp_path / "store", tokenizer="train:64", workers=1)
    assert not (tmp_path / "store").exists()


def test_two_conversions_into_one_folder_do_not_mix(sample, tmp_path):
    def start_another(stage: str, done: int, total: int) -> None:
        with pytest.raises(LockedError, match="another process"):
            sample.convert(tmp_path / "store")
        raise Stop

    with pytest.raises(Stop):
        sample.convert(tmp_path / "store", progress=start_another)


def test_an_input_that_changes_during_the_conversion_is_refused(sample, tmp_path):
    train = tmp_path / "train.jsonl"
    train.write_bytes(sample.train.read_bytes())

    def touch(stage: str, done: int, total: int) -> None:
        if stage == "writing train":
            with open(train, "ab") as stream:
                stream.write(b"\n")

    with pytest.raises(UserError, match="changed during"):
        convert([train], tmp_path / "store", tokenizer="train:64", workers=1, progress=touch)
    assert not (tmp_path / "store").exists()


def test_a_worker_that_dies_is_reported_and_the_conversion_can_go_on(sample, sample_store, tree, tmp_path):
    def kill_workers(stage: str, done: int, total: int) -> None:
        if stage == "counting train":
            for child in multiprocessing.active_children():
                child.kill()

    with pytest.raises(ElmoStreamError, match="worker process died"):
        sample.convert(tmp_path / "store", workers=2, progress=kill_workers)
    with pytest.raises(UserError, match="unfinished conversion"):
        StoreIndex.load(tmp_path / "store")
    sample.convert(tmp_path / "store")
    assert tree(tmp_path / "store") == tree(sample_store)


def test_other_options_start_an_interrupted_conversion_afresh_and_say_so(sample, store_of_another_seed, tree, tmp_path):
    def stop(stage: str, done: int, total: int) -> None:
        if stage == "writing train" and done == 2:
            raise Stop

    notes: list[str] = []
    with pytest.raises(Stop):
        sample.convert(tmp_path / "store", progress=stop)
    sample.convert(tmp_path / "store", seed=8, report=notes.append)
    assert any("starting afresh" in note for note in notes)
    assert tree(tmp_path / "store") == tree(store_of_another_seed)


def test_a_conversion_stopped_behind_its_last_write_is_finished_by_the_next_call(
    sample, sample_store, tree, tmp_path, monkeypatch
):
    def stop(out: Path) -> None:
        raise Stop

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr("elmo_stream.data.shard.remove_scratch", stop)
        sample.convert(tmp_path / "store")
    before = tree(tmp_path / "store")
    with pytest.raises(UserError, match="exists already"):
        sample.convert(tmp_path / "store", seed=8)
    assert tree(tmp_path / "store") == before
    sample.convert(tmp_path / "store")
    assert tree(tmp_path / "store") == tree(sample_store)


def test_paths_may_be_relative(sample, tmp_path, monkeypatch):
    monkeypatch.chdir(sample.train.parent)
    relative = type(sample)(Path("train.jsonl"), Path("test.jsonl"))
    assert relative.convert(tmp_path / "store", tokenizer="train:64")["labels"] > 0
