"""Batches arrive in one order, whole and once, however they are read; a position is three integers."""

import itertools
import threading
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

from elmo_stream.config import LoaderConfig
from elmo_stream.data.batch import Batch
from elmo_stream.data.index import StoreIndex
from elmo_stream.data.labels import LabelNames
from elmo_stream.data.loader import StreamLoader
from elmo_stream.data.order import WINDOW_SHARDS
from elmo_stream.data.rows import SplitRows
from elmo_stream.data.shard import convert
from elmo_stream.data.store import Shard, open_store
from elmo_stream.data.tokenize import Tokenizer
from elmo_stream.errors import CorruptError, UserError

BATCH, BLOCK = 24, 1024


def _loader(store: Path, *, workers: int = 0, prefetch: int = 2, bucket: int = 4, **kwargs: object) -> StreamLoader:
    config = LoaderConfig(workers=workers, prefetch=prefetch, bucket=bucket)
    return StreamLoader(store, batch=BATCH, seed=5, block_labels=BLOCK, config=config, **kwargs)  # type: ignore[arg-type]


def _take(loader: StreamLoader, count: int) -> list[Batch]:
    return list(itertools.islice(iter(loader), count))


def _same(left: Batch, right: Batch) -> bool:
    pairs = [
        (left.token_ids_BT, right.token_ids_BT),
        (left.mask_BT, right.mask_BT),
        (left.instance_B, right.instance_B),
        (left.positives.label_P, right.positives.label_P),
        (left.positives.instance_P, right.positives.instance_P),
        (left.positives.block_ptr, right.positives.block_ptr),
    ]
    return all(torch.equal(a, b) for a, b in pairs)


def test_an_epoch_delivers_every_instance_once_with_its_own_tokens_and_labels(store: Path) -> None:
    index, shards = StoreIndex.load(store), open_store(store)
    rows = [
        (shard, row)
        for entry in index.splits["train"].shards
        for shard in [shards.read_shard("train", entry)]
        for row in range(shard.rows)
    ]
    seen = []
    with _loader(store, workers=1) as loader:
        for batch in _take(loader, loader.batches_per_epoch):
            for place, instance in enumerate(batch.instance_B.tolist()):
                shard, row = rows[instance]
                tokens = shard.tokens[shard.token_offsets[row] : shard.token_offsets[row + 1]]
                assert batch.token_ids_BT[place][batch.mask_BT[place]].tolist() == tokens.tolist()
                labels = shard.labels[shard.label_offsets[row] : shard.label_offsets[row + 1]]
                mine = batch.positives.label_P[batch.positives.instance_P == place]
                assert mine.tolist() == labels.tolist()
                seen.append(instance)
    assert sorted(seen) == list(range(len(rows)))


@pytest.mark.parametrize(("workers", "prefetch"), [(0, 1), (1, 1), (1, 8), (4, 2), (4, 16)])
def test_workers_and_prefetch_change_no_batch(store: Path, workers: int, prefetch: int) -> None:
    with _loader(store) as plain, _loader(store, workers=workers, prefetch=prefetch) as other:
        count = 2 * plain.batches_per_epoch + 3
        assert all(_same(a, b) for a, b in zip(_take(plain, count), _take(other, count), strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_any_position_resumes_with_the_batch_that_would_have_come(store: Path, workers: int) -> None:
    with _loader(store) as loader:
        per_epoch = loader.batches_per_epoch
        walk = _take(loader, 2 * per_epoch + 2)
    for consumed in (0, 1, 3, 4, per_epoch - 1, per_epoch, per_epoch + 1, 2 * per_epoch):
        with _loader(store, workers=workers) as first:
            _take(first, consumed)
            state = first.state_dict()
        assert state["instances_seen"] < first.instances
        with _loader(store, workers=workers) as second:
            second.load_state_dict(state)
            assert second.state_dict() == state
            assert _same(_take(second, 1)[0], walk[consumed])
            third_state = second.state_dict()
        with _loader(store) as third:
            third.load_state_dict(third_state)
            assert _same(_take(third, 1)[0], walk[consumed + 1])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_is_read_once_an_epoch_and_forgotten_with_its_window(
    corpus: Path, tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet = {"tokenizer": "train:1200", "max_length": 32, "workers": 1, "report": lambda line: None}
    convert([corpus / "train.jsonl"], tmp_path / "store", rows_per_shard=50, **quiet)  # type: ignore[arg-type]
    read: list[int] = []
    held: dict[int, weakref.finalize] = {}  # type: ignore[type-arg]
    read_shard = SplitRows.read

    def counted(rows: SplitRows, number: int) -> Shard:
        read.append(number)
        shard = read_shard(rows, number)
        held[number] = weakref.finalize(shard, lambda: None)
        return shard

    monkeypatch.setattr(SplitRows, "read", counted)
    with _loader(tmp_path / "store", workers=workers, prefetch=2, bucket=1) as loader:
        batches = itertools.islice(loader, loader.batches_per_epoch - 2)
        alive = [sum(shard.alive for shard in held.values()) for _ in batches]
    assert sorted(read) == list(range(30))
    # The last groups of a window are waited for while those of the next one are read.
    assert max(alive) <= 2 * WINDOW_SHARDS and min(alive[len(alive) // 2 :]) <= WINDOW_SHARDS


def test_positives_are_sorted_with_a_pointer_per_block(store: Path) -> None:
    labels = StoreIndex.load(store).labels.count
    assert labels > BLOCK
    with _loader(store) as loader:
        positives = _take(loader, 1)[0].positives
    assert (positives.label_P.diff() >= 0).all()
    same = positives.label_P.diff() == 0
    assert (positives.instance_P.diff()[same] > 0).all()
    assert len(positives.block_ptr) == -(-labels // BLOCK) + 1
    blocks = np.searchsorted(positives.block_ptr.numpy(), np.arange(len(positives.label_P)), side="right") - 1
    assert np.array_equal(blocks, positives.label_P.numpy() // BLOCK)


def test_bucketing_saves_padding_and_keeps_instances(store: Path) -> None:
    def padded(bucket: int) -> tuple[int, list[int]]:
        with _loader(store, bucket=bucket) as loader:
            batches = _take(loader, loader.batches_per_epoch)
        return sum(b.token_ids_BT.numel() for b in batches), sorted(i for b in batches for i in b.instance_B.tolist())

    plain, bucketed = padded(1), padded(16)
    assert bucketed[1] == plain[1]
    assert bucketed[0] < 0.9 * plain[0]


def test_evaluation_goes_once_over_the_rows_asked_for(store: Path) -> None:
    with _loader(store, shuffle=False, rows=(1400, 1500)) as loader:
        ids = sorted(i for batch in loader for i in batch.instance_B.tolist())
    assert ids == list(range(1400, 1500))


def test_training_rows_exclude_the_validation_rows(store: Path) -> None:
    with _loader(store, rows=(0, 1300)) as loader:
        ids = sorted(i for batch in _take(loader, loader.batches_per_epoch) for i in batch.instance_B.tolist())
    assert ids == list(range(1300))


def test_a_state_of_another_run_is_refused(store: Path) -> None:
    with _loader(store) as loader:
        state = loader.state_dict()
        for key, value in {"seed": 6, "store": "x", "batch": 7, "bucket": 5, "version": 99}.items():
            with pytest.raises(UserError, match=key):
                loader.load_state_dict({**state, key: value})
        _take(loader, 1)
        with pytest.raises(UserError, match="already in use"):
            loader.load_state_dict(state)


def test_closing_in_the_middle_leaves_no_thread(store: Path) -> None:
    before = threading.active_count()
    loader = _loader(store, workers=4, prefetch=8)
    iterator = iter(loader)
    next(iterator)
    loader.close()
    loader.close()
    assert threading.active_count() == before


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_shard_ends_the_iteration_with_its_name(store: Path, tmp_path: Path, workers: int) -> None:
    import shutil

    copy = tmp_path / "store"
    shutil.copytree(store, copy)
    entry = StoreIndex.load(copy).splits["train"].shards[2]
    largest = max(
        (copy / "train" / entry.name).rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0
    )
    largest.write_bytes(largest.read_bytes()[:-7])
    with _loader(copy, workers=workers) as loader, pytest.raises(CorruptError, match=entry.name):
        _take(loader, loader.batches_per_epoch)


@pytest.mark.parametrize("last", [1500, 1290, 700])
def test_label_names_join_an_epoch_once_each_with_their_own_label_alone(store: Path, last: int) -> None:
    names, tokenizer = LabelNames(store / "labels"), Tokenizer.load(store / "tokenizer")
    rows, labels, texts = [], [], []
    with _loader(store, rows=(0, last), label_texts=True) as loader:
        assert loader.instances == last + len(names)
        batches = _take(loader, loader.batches_per_epoch)
    for batch in batches:
        for place, instance in enumerate(batch.instance_B.tolist()):
            if instance < last:
                rows.append(instance)
                continue
            texts.append(instance - last)
            (label,) = batch.positives.label_P[batch.positives.instance_P == place].tolist()
            labels.append(label)
            tokens, _, _ = tokenizer.encode_batch(names[[label]])
            assert batch.token_ids_BT[place][batch.mask_BT[place]].tolist() == tokens.tolist()
    assert sorted(rows) == list(range(last))
    assert sorted(labels) == sorted(texts) == list(range(len(names)))
    by_text = [label for _, label in sorted(zip(texts, labels, strict=True))]
    assert by_text != sorted(by_text)
    for half in (batches[: len(batches) // 2], batches[len(batches) // 2 :]):
        share = np.mean([(batch.instance_B >= last).double().mean().item() for batch in half])
        assert share == pytest.approx(len(names) / (last + len(names)), abs=0.06)


def test_label_names_keep_the_order_and_its_positions(store: Path) -> None:
    def batches(seen: int, workers: int, prefetch: int = 1) -> list[Batch]:
        with _loader(store, rows=(0, 1290), label_texts=True, workers=workers, prefetch=prefetch) as loader:
            loader.load_state_dict({**loader.state_dict(), "instances_seen": seen * BATCH})
            return _take(loader, loader.batches_per_epoch + 3 - seen)

    walk = batches(0, workers=0)
    for seen, workers in ((0, 3), (1, 0), (9, 2)):
        assert all(_same(a, b) for a, b in zip(batches(seen, workers, prefetch=5), walk[seen:], strict=True))
    with _loader(store, rows=(0, 1290)) as plain, pytest.raises(UserError, match="instances"):
        plain.load_state_dict({**plain.state_dict(), "instances": 1290 + len(LabelNames(store / "labels"))})


def test_an_unknown_split_is_refused_with_the_known_ones(store: Path) -> None:
    with pytest.raises(UserError, match="train, test"):
        _loader(store, split="valid")
