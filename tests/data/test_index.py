"""An index is what was written, or an error that says what is wrong with it."""

import dataclasses
import json
import shutil

import pytest

from elmo_stream.data.index import StoreIndex
from elmo_stream.data.store import open_store
from elmo_stream.errors import CorruptError, UserError


@pytest.fixture
def copy(sample_store, tmp_path):
    """A copy of the store, to be damaged."""
    return shutil.copytree(sample_store, tmp_path / "copy")


def write_index(store, change) -> None:
    path = store / "index.json"
    value = json.loads(path.read_bytes())
    change(value)
    path.write_text(json.dumps(value))


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (lambda value: value.update(version=3), UserError, "version 3"),
        (lambda value: value.update(format="other"), CorruptError, "'format'"),
        (lambda value: value.update(seed=1), CorruptError, "fingerprint"),
        (lambda value: value.update(extra=1), CorruptError, "exactly the keys"),
        (lambda value: value.pop("labels"), CorruptError, "exactly the keys"),
        (lambda value: value.update(seed=-1), CorruptError, "seed"),
        (lambda value: value.update(seed=True), CorruptError, "seed"),
        (lambda value: value["labels"].update(files={"../x": {}}), CorruptError, "not the name of a file"),
        (lambda value: value["labels"].update(files={"x": 1}), CorruptError, "expected bytes and sha256"),
        (lambda value: value["tokenizer"].update(kind=3), CorruptError, "kind"),
    ],
)
def test_an_altered_index_is_refused_and_says_where(copy, change, error, says):
    write_index(copy, change)
    with pytest.raises(error, match=says):
        StoreIndex.load(copy)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda index: {"labels": dataclasses.replace(index.labels, count=0)}, "labels.count"),
        (lambda index: {"backend": "other"}, "backend 'other'"),
        (lambda index: {"splits": {}}, "splits"),
        (lambda index: {"splits": index.splits | {"other": index.splits["test"]}}, "splits"),
        (lambda index: {"splits": {"train": dataclasses.replace(index.splits["train"], tokens=1)}}, "add up"),
    ],
)
def test_an_index_that_contradicts_itself_is_refused(copy, change, says):
    index = StoreIndex.load(copy)
    dataclasses.replace(index, **change(index)).save(copy)
    with pytest.raises(CorruptError, match=says):
        StoreIndex.load(copy)


def test_a_shard_without_rows_is_refused(copy):
    index = StoreIndex.load(copy)
    train = index.splits["train"]
    empty = dataclasses.replace(train.shards[0], rows=0, tokens=0, positives=0)
    splits = index.splits | {"train": dataclasses.replace(train, shards=(empty, *train.shards))}
    dataclasses.replace(index, splits=splits).save(copy)
    with pytest.raises(CorruptError, match="has no rows"):
        StoreIndex.load(copy)


def test_the_name_of_a_shard_cannot_lead_out_of_the_store(copy):
    index = StoreIndex.load(copy)
    train = index.splits["train"]
    shards = (dataclasses.replace(train.shards[0], name="../../shard-00000"), *train.shards[1:])
    splits = {"train": dataclasses.replace(train, shards=shards)}
    dataclasses.replace(index, splits=splits).save(copy)
    with pytest.raises(CorruptError, match="not a shard's name"):
        StoreIndex.load(copy)


def test_a_folder_that_is_no_store_says_what_to_do(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        open_store(tmp_path / "missing")
    with pytest.raises(UserError, match="not a store"):
        open_store(tmp_path)


def test_an_index_survives_a_round_trip(sample_store, tmp_path):
    index = StoreIndex.load(sample_store)
    index.save(tmp_path)
    assert StoreIndex.load(tmp_path) == index
    assert (tmp_path / "index.json").read_bytes() == (sample_store / "index.json").read_bytes()
