"""A warm start loses nothing that was learned: known labels keep their rows, new ones are trained beside them."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch

from elmo_stream.config import load_config
from elmo_stream.data import label_match
from elmo_stream.data.label_match import ABSENT, match_labels
from elmo_stream.data.labels import LabelNames
from elmo_stream.data.shard import convert
from elmo_stream.errors import UserError
from elmo_stream.training.checkpoint import checkpoint_steps, load_checkpoint
from elmo_stream.training.predict import Predictor
from elmo_stream.training.trainer import resume, train
from tests.cli_helpers import assert_refused, run_cli

TOPICS = 300
KEYS = ["encoder.dim=64", "encoder.bigrams=0", "train.batch=64", "classifier.kahan_head=0.3"]
KEYS += ["train.validation=0", "optimizer.warmup_steps=5", "optimizer.classifier_lr=0.1", "threads=1"]


def _is_new(label: str) -> bool:
    return int(label.split()[1]) % 10 == 3


def _write(path: Path, instances: int, seed: int, *, new: bool) -> list[dict[str, object]]:
    """Texts whose words tell their labels; without ``new``, nine labels of ten, and other frequencies."""
    rng = random.Random(seed)
    rows = []
    while len(rows) < instances:
        topics = {min(int(rng.expovariate(1 / 100)), TOPICS - 1) for _ in range(3)}
        labels = sorted(label for label in (f"label {topic}" for topic in topics) if new or not _is_new(label))
        if labels:
            words = [word for topic in topics for word in (f"word{topic}", rng.choice("abcdefgh"))]
            rows.append({"text": " ".join(words), "labels": labels if new else ["gone", *labels]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A store with nine labels of ten, and one of the same tokenizer with all."""
    folder = tmp_path_factory.mktemp("warm")
    _write(folder / "old.jsonl", 2000, 1, new=False)
    _write(folder / "new.jsonl", 2000, 2, new=True)
    options = {"max_length": 16, "workers": 1, "report": lambda line: None}
    convert([folder / "old.jsonl"], folder / "old", tokenizer="train:1500", **options)  # type: ignore[arg-type]
    tokenizer = str(folder / "old" / "tokenizer")
    convert([folder / "new.jsonl"], folder / "new", tokenizer=tokenizer, **options)  # type: ignore[arg-type]
    return folder / "old", folder / "new"


@pytest.fixture(scope="module")
def old_run(stores: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("warm-runs") / "old"
    assert train(stores[0], out, load_config(None, [*KEYS, "train.epochs=5"]), report=lambda line: None) == 0
    return out


def _precision_at_1(run: Path, rows: list[dict[str, object]], *, new: bool) -> float:
    """P@1 among the old or the new labels, over the instances that have one."""
    tagged = [(row["text"], {label for label in row["labels"] if _is_new(label) == new}) for row in rows]  # type: ignore[attr-defined]
    tagged = [(text, truth) for text, truth in tagged if truth]
    answers = Predictor(run, report=lambda line: None)([str(text) for text, _ in tagged], k=100)
    hits = 0
    for (_, truth), answer in zip(tagged, answers, strict=True):
        ranked = [name for name, _ in answer if name != "gone" and _is_new(name) == new]
        hits += bool(ranked) and ranked[0] in truth
    return hits / len(tagged)


def test_old_labels_keep_their_precision_and_new_ones_are_learned(
    stores: tuple[Path, Path], old_run: Path, tmp_path: Path
) -> None:
    out, heard = tmp_path / "new", []
    config = load_config(None, [*KEYS, "train.epochs=1"])
    assert train(stores[1], out, config, init_from=old_run, report=heard.append) == 0
    old, new = ({*names[range(len(names))]} for names in (LabelNames(store / "labels") for store in stores))
    expected = f"{len(old & new)} labels kept, {len(new - old)} new, {len(old - new)} gone"
    assert any(expected in line for line in heard), heard
    assert "gone" in old - new and 0.08 < len(new - old) / len(new) < 0.15
    rows = _write(tmp_path / "test.jsonl", 1500, 3, new=True)
    before = _precision_at_1(old_run, rows, new=False)
    assert before > 0.8
    untrained = tmp_path / "untrained"
    still = [*KEYS, "train.steps=1", "optimizer.classifier_lr=1e-9", "optimizer.encoder_lr=1e-9"]
    assert train(stores[1], untrained, load_config(None, still), init_from=old_run, report=heard.append) == 0
    assert _precision_at_1(untrained, rows, new=False) == pytest.approx(before, abs=0.005)
    assert _precision_at_1(out, rows, new=False) >= before - 0.005
    assert _precision_at_1(out, rows, new=True) > 2 * _precision_at_1(untrained, rows, new=True)


@pytest.mark.parametrize("fmt", ["fp32", "bf16", "fp8"])
def test_known_rows_are_copied_with_all_that_belongs_to_them(
    stores: tuple[Path, Path], tmp_path: Path, fmt: str
) -> None:
    head = [] if fmt == "fp32" else ["classifier.kahan_head=0.4"]
    keys = ["encoder.dim=32", "train.batch=512", f"classifier.format={fmt}", *head]
    old, new = tmp_path / "old", tmp_path / "new"
    assert train(stores[0], old, load_config(None, [*keys, "train.steps=5"]), report=lambda line: None) == 0
    config = load_config(None, [*keys, "train.steps=1", "checkpoint.every_steps=1", "checkpoint.keep=9"])
    assert train(stores[1], new, config, init_from=old, report=lambda line: None) == 0
    assert checkpoint_steps(new) == [0, 1]
    before, after = load_checkpoint(old), load_checkpoint(new, 0)
    assert before is not None and after is not None
    for name, tensor in before.tensors("encoder").items():
        assert torch.equal(after.tensors("encoder")[name], tensor)
    old_names, new_names = LabelNames(stores[0] / "labels"), LabelNames(stores[1] / "labels")
    id_of = {name: i for i, name in enumerate(old_names[range(len(old_names))])}
    parts = {"fp32": ["weight"], "bf16": ["weight", "compensation"], "fp8": ["weight", "exponent", "compensation"]}
    for part in parts[fmt]:
        share = 0.4 if part == "compensation" else 1
        old_rows, new_rows = int(share * len(old_names)), int(share * len(new_names))
        theirs, mine = before.rows(part, 0, old_rows), after.rows(part, 0, new_rows)
        copied = 0
        for row, name in enumerate(new_names[range(new_rows)]):
            if name in id_of and id_of[name] < old_rows:
                assert torch.equal(mine[row], theirs[id_of[name]]), (part, name)
                copied += bool(theirs[id_of[name]].any())
            elif part == "compensation":
                assert not mine[row].any()
        assert copied > 50


def test_a_warm_start_killed_before_its_first_step_goes_on_warm(
    stores: tuple[Path, Path], old_run: Path, tmp_path: Path
) -> None:
    config = load_config(None, [*KEYS, "train.steps=2", "checkpoint.keep=9"])
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert train(stores[1], whole, config, init_from=old_run, report=lambda line: None) == 0
    shutil.copytree(whole, killed)
    shutil.rmtree(killed / "checkpoints" / "step-00000002")
    assert resume(killed, report=lambda line: None) == 0
    ends = [load_checkpoint(run) for run in (whole, killed)]
    weights = [end.rows("weight", 0, 200) for end in ends if end is not None]
    assert torch.equal(weights[0], weights[1])


def test_labels_are_matched_by_name_whatever_the_parts(
    stores: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = LabelNames(stores[0] / "labels"), LabelNames(stores[1] / "labels")
    id_of = {name: i for i, name in enumerate(old[range(len(old))])}
    expected = [id_of.get(name, ABSENT) for name in new[range(len(new))]]
    assert match_labels(old, new).tolist() == expected
    monkeypatch.setattr(label_match, "PART_LABELS", 40)
    assert match_labels(old, new).tolist() == expected


def test_what_does_not_fit_is_refused_with_what_to_do(
    store: Path, stores: tuple[Path, Path], old_run: Path, tmp_path: Path
) -> None:
    def start(place: Path, *keys: str) -> object:
        options = [part for key in (*KEYS, *keys) for part in ("--set", key)]
        return run_cli("train", place, "--out", tmp_path / "new", "--init-from", old_run, *options)

    assert_refused(start(store), "--tokenizer", str(old_run / "tokenizer"), "--max-length 16")  # type: ignore[arg-type]
    assert_refused(start(stores[1], "encoder.dim=32"), "encoder.dim is 32, but 64", str(old_run / "config.toml"))  # type: ignore[arg-type]
    assert_refused(start(stores[1], "classifier.format=bf16"), "classifier.format")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="not a run folder"):
        train(stores[1], tmp_path / "new", load_config(None, KEYS), init_from=tmp_path / "nowhere")
    assert not (tmp_path / "new").exists() or not any((tmp_path / "new").iterdir())
