"""Stopping costs nothing: a run stopped and resumed anywhere ends in the bytes of one that never stopped."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from elmo_stream.config import load_config
from elmo_stream.training.checkpoint import checkpoint_steps
from elmo_stream.training.trainer import resume, train
from tests.training.left_behind import forget_after, metrics_of, tensor_files

BAG = ["encoder.kind=bag", "encoder.dim=32"]
SMALL = ["train.batch=300", "train.validation=0.2", "train.epochs=2", "optimizer.warmup_steps=2", "loader.bucket=3"]
EVERY_STEP = ["checkpoint.every_steps=1", "checkpoint.keep=1000"]
STEPS, PER_EPOCH = 8, 4


def _encoder(kind: str, bert: Path) -> list[str]:
    return BAG if kind == "bag" else ["encoder.kind=transformer", f"encoder.name={json.dumps(str(bert))}"]


def _train(store: Path, out: Path, keys: list[str]) -> Path:
    assert train(store, out, load_config(None, [*SMALL, *keys]), report=lambda line: None) == 0
    return out


@pytest.mark.parametrize("encoder", ["bag", "bert"])
@pytest.mark.parametrize("fmt", ["fp32", "bf16", "fp8"])
def test_stopped_and_resumed_equals_uninterrupted(
    store: Path, bert: Path, tmp_path: Path, encoder: str, fmt: str
) -> None:
    keys = [*_encoder(encoder, bert), f"classifier.format={fmt}", "encoder.dropout=0.2"]
    whole = _train(store, tmp_path / "whole", keys)
    stops = _train(store, tmp_path / "stops", [*keys, *EVERY_STEP])
    assert tensor_files(stops, STEPS) == tensor_files(whole, STEPS), "checkpointing must not change the training"
    for stop in ([0], [PER_EPOCH // 2], [PER_EPOCH], [1, PER_EPOCH + 1]):
        run = tmp_path / f"stopped-{'-'.join(map(str, stop))}"
        shutil.copytree(stops, run)
        for step in stop:
            forget_after(run, step)
            assert resume(run, report=lambda line: None) == 0
        assert tensor_files(run, STEPS) == tensor_files(whole, STEPS), f"stopped after steps {stop}"
        assert metrics_of(run) == metrics_of(whole)


@pytest.mark.parametrize(
    "keys",
    [
        ["encoder.format=bf16"],
        ["encoder.format=bf16", "encoder.rounding=stochastic", "optimizer.states=8bit"],
        ["classifier.rounding=kahan", "classifier.format=bf16"],
        ["classifier.kahan_head=0.5"],
        ["encoder.frozen=true"],
        ["train.micro_batch=70", "encoder.dropout=0.2"],
        ["train.label_texts=true"],
        ["encoder.hidden=48"],
        ["classifier.loss=squared_hinge"],
    ],
)
def test_other_configurations_resume_exactly_too(store: Path, tmp_path: Path, keys: list[str]) -> None:
    whole = _train(store, tmp_path / "whole", [*BAG, *keys, *EVERY_STEP])
    run = tmp_path / "stopped"
    shutil.copytree(whole, run)
    forget_after(run, 3)
    assert resume(run, report=lambda line: None) == 0
    assert tensor_files(run, STEPS) == tensor_files(whole, STEPS)


@pytest.mark.parametrize("encoder", ["bag", "bert"])
@pytest.mark.parametrize("fmt", ["fp32", "bf16", "fp8"])
def test_workers_prefetch_and_chunk_size_change_no_weight(
    store: Path, bert: Path, tmp_path: Path, encoder: str, fmt: str
) -> None:
    from elmo_stream.training.checkpoint import load_checkpoint

    def weights(name: str, *keys: str) -> dict[str, bytes]:
        run = _train(store, tmp_path / name, [*_encoder(encoder, bert), f"classifier.format={fmt}", *keys])
        checkpoint = load_checkpoint(run)
        assert checkpoint is not None
        labels = json.loads((run / "run.json").read_text())["labels"]
        assert labels > 1024
        parts = ("weight", "exponent") if fmt == "fp8" else ("weight",)
        tensors = {
            **checkpoint.tensors("encoder"),
            **checkpoint.tensors("optimizer"),
            **{part: checkpoint.rows(part, 0, labels) for part in parts},
        }
        return {part: tensor.reshape(-1).view(torch.uint8).numpy().tobytes() for part, tensor in tensors.items()}

    reference = weights("reference", "loader.workers=0", "classifier.chunk_labels=100000")
    assert weights("one-worker", "loader.workers=1", "classifier.chunk_labels=1000") == reference
    assert weights("four-workers", "loader.workers=4", "loader.prefetch=7", "classifier.chunk_labels=4096") == reference
    assert weights("other-seed", "seed=1") != reference


def _start(arguments: list[str]) -> "subprocess.Popen[str]":
    return subprocess.Popen([sys.executable, "-m", "elmo_stream", *arguments], stderr=subprocess.PIPE, text=True)


def _wait_for_line(process: "subprocess.Popen[str]", word: str) -> None:
    assert process.stderr is not None
    for line in process.stderr:
        if word in line:
            return
    raise AssertionError(f"the process ended before it said {word!r}")


def test_killed_with_sigkill_and_resumed_equals_uninterrupted(store: Path, tmp_path: Path) -> None:
    keys = [*SMALL, *BAG, "train.epochs=40", "checkpoint.every_steps=5"]
    whole = tmp_path / "whole"
    assert train(store, whole, load_config(None, keys), report=lambda line: None) == 0
    run = tmp_path / "killed"
    process = _start(["train", str(store), "--out", str(run), *(part for key in keys for part in ("--set", key))])
    _wait_for_line(process, "validation")
    process.kill()
    process.communicate()
    assert resume(run, report=lambda line: None) == 0
    assert tensor_files(run, 160) == tensor_files(whole, 160)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_the_step_at_hand_and_says_how_to_go_on(
    store: Path, tmp_path: Path, number: int, code: int
) -> None:
    run = tmp_path / "run"
    keys = [*SMALL, *BAG, "train.epochs=1000"]
    process = _start(["train", str(store), "--out", str(run), *(part for key in keys for part in ("--set", key))])
    _wait_for_line(process, "validation")
    process.send_signal(number)
    _, errors = process.communicate()
    assert process.returncode == code
    assert f"elmo-stream resume {run}" in errors
    (step,) = checkpoint_steps(run)
    assert 0 < step < 4000


def test_validation_takes_the_valid_split_where_there_is_one(corpus: Path, store: Path, tmp_path: Path) -> None:
    from elmo_stream.data.shard import convert

    other = tmp_path / "store"
    convert([corpus / "train.jsonl"], other, valid=[corpus / "test.jsonl"], tokenizer="train:300", workers=1)
    for place, instances, validation in ((store, 1200, 300), (other, 1500, 200)):
        run = _train(place, tmp_path / f"run-{validation}", [*BAG, "train.steps=1"])
        info = json.loads((run / "run.json").read_text())
        assert (info["instances"], info["validation_instances"]) == (instances, validation)
        assert any("validation/P@1" in row for row in metrics_of(run))
