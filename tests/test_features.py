"""Features with weights, from a file to predictions: a user of bags of words loses nothing on the way."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from elmo_stream.config import EncoderConfig
from elmo_stream.data.filters import NO_PAIRS
from elmo_stream.model.encoder import BagEncoder
from elmo_stream.training.evaluate import evaluate
from tests.cli_helpers import assert_refused, run_cli

FEATURES, LABELS = 60, 20


def write_rows(path: Path, rows: int, seed: int) -> list[int]:
    """Rows whose label is that of the feature with the largest weight, among others of small weight; returns them."""
    chance, lines, truth = random.Random(seed), [], []
    for _ in range(rows):
        entries = dict.fromkeys(chance.sample(range(FEATURES), 6), 0.1)
        loud = chance.choice(sorted(entries))
        entries[loud] = 3.0
        truth.append(loud % LABELS)
        lines.append(f"{truth[-1]} " + " ".join(f"{index}:{weight}" for index, weight in sorted(entries.items())))
    path.write_text(f"{rows} {FEATURES} {LABELS}\n" + "\n".join(lines) + "\n")
    return truth


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a store of features, its filter, and a trained run."""
    folder = tmp_path_factory.mktemp("features")
    write_rows(folder / "train.txt", 1000, seed=1)
    truth = write_rows(folder / "test.txt", 150, seed=2)
    (folder / "filter.txt").write_text("".join(f"{row} {label}\n" for row, label in enumerate(truth[:50])))
    files = (folder / "train.txt", "--test", folder / "test.txt", "--filter", folder / "filter.txt")
    result = run_cli("shard", *files, "--out", folder / "store", "--workers", 1)
    assert result.exit_code == 0, result.output
    keys = ["threads=1", "encoder.dim=32", "encoder.dropout=0.1", "train.batch=64", "train.epochs=6"]
    keys += ["optimizer.warmup_steps=10", "optimizer.encoder_lr=0.03"]
    options = [word for key in keys for word in ("--set", key)]
    result = run_cli("train", folder / "store", "--out", folder / "run", *options)
    assert result.exit_code == 0, result.output
    return folder


def test_the_weights_decide_and_the_filter_of_the_store_is_used(trained):
    without = evaluate(trained / "run", ks=(1,), filtered=NO_PAIRS, report=lambda line: None)["metrics"]["P@1"]
    assert without > 0.9  # weights unseen, a sixth of the rows would be right
    filtered = evaluate(trained / "run", ks=(1,), report=lambda line: None)["metrics"]["P@1"]
    assert filtered < without - 0.3  # the labels of a third of the rows may not be ranked


def test_models_of_features_are_used_in_the_memory_that_their_training_took(trained, tmp_path):
    for verb in (
        ("evaluate", trained / "run"),
        ("predict", trained / "run", trained / "test.txt", "--out", tmp_path / "o.jsonl"),
    ):
        result = run_cli(*verb, "--set", "memory.device=3GiB")
        assert result.exit_code == 0, result.output


def test_a_file_of_features_is_tagged_with_or_without_its_labels(trained, tmp_path):
    lines = (trained / "test.txt").read_text().splitlines()
    rows = [line.partition(" ")[2] for line in lines[1:]]
    (tmp_path / "new.txt").write_text(f"{len(rows)} {FEATURES}\n" + "\n".join(rows) + "\n")
    for source in (trained / "test.txt", tmp_path / "new.txt"):
        out = tmp_path / f"{source.stem}.jsonl"
        result = run_cli("predict", trained / "run", source, "--out", out, "--top-k", 1)
        assert result.exit_code == 0, result.output
    assert (tmp_path / "new.jsonl").read_bytes() == (tmp_path / "test.jsonl").read_bytes()
    tagged = [json.loads(line)["labels"][0] for line in (tmp_path / "new.jsonl").read_text().splitlines()]
    assert np.mean([name == line.partition(" ")[0] for name, line in zip(tagged, lines[1:], strict=True)]) > 0.9


def test_what_features_cannot_do_is_refused(trained, tmp_path):
    assert_refused(run_cli("predict", trained / "run", "--text", "a text"), "trained on features")
    for keys, says in (
        (["encoder.kind=transformer", "encoder.name=x"], "only a bag"),
        (["train.label_texts=true"], "train.label_texts"),
    ):
        options = [word for key in keys for word in ("--set", key)]
        assert_refused(run_cli("train", trained / "store", "--out", tmp_path / "run", *options), says)
    shard = ("shard", trained / "train.txt", "--out", tmp_path / "store", "--workers", 1)
    assert_refused(run_cli(*shard, "--tokenizer", "train:100"), "--tokenizer", "only bow")
    (tmp_path / "t.jsonl").write_text('{"text": "a", "labels": ["b"]}\n')
    shard = ("shard", tmp_path / "t.jsonl", "--out", tmp_path / "store", "--tokenizer", "bow")
    assert_refused(run_cli(*shard), "--tokenizer bow", "texts")
    write_rows(tmp_path / "other.txt", 3, seed=1)
    other = (tmp_path / "other.txt").read_text().replace(f"3 {FEATURES} ", f"3 {FEATURES + 1} ")
    (tmp_path / "other.txt").write_text(other)
    shard = ("shard", trained / "train.txt", "--test", tmp_path / "other.txt", "--out", tmp_path / "store")
    assert_refused(run_cli(*shard, "--workers", 1), "different numbers of features")


def test_features_have_no_order_and_their_weights_scale_what_they_add():
    bag = BagEncoder(EncoderConfig(dim=32), 100, 8, torch.Generator().manual_seed(1), ordered=False)
    ids_BT, mask_BT = torch.tensor([[3, 4, 5, 0]]), torch.tensor([[True, True, True, False]])
    weight_BT = torch.tensor([[0.5, -2.0, 1.0, 0.0]])
    x_BD = bag(ids_BT, mask_BT, weight_BT)
    turned = torch.tensor([[2, 1, 0, 3]])
    torch.testing.assert_close(bag(ids_BT.gather(1, turned), mask_BT, weight_BT.gather(1, turned)), x_BD)
    sum_D = (bag.embedding_VD[ids_BT[0]] * weight_BT[0].unsqueeze(1)).sum(0)
    torch.testing.assert_close(x_BD[0], sum_D)
