"""One batch with absurd data ends a training with the step's name, costs no more than that step, or is left behind."""

import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch

from elmo_stream.config import OptimizerConfig, load_config
from elmo_stream.data.loader import StreamLoader
from elmo_stream.data.shard import convert
from elmo_stream.training.checkpoint import checkpoint_folder, checkpoint_steps
from elmo_stream.training.finite import Diverged, FiniteWatch
from elmo_stream.training.optim import build_optimizer, optimizer_tensors
from elmo_stream.training.run import Run, open_run
from elmo_stream.training.trainer import resume, train
from tests.training.left_behind import forget_after, metrics_of, tensor_files

FEATURES, LABELS, ROWS = 60, 40, 50
KEYS = [
    "encoder.dim=32", "train.batch=10", "train.validation=0", "train.epochs=2", "optimizer.warmup_steps=2",
    "loader.bucket=3", "threads=1", "checkpoint.every_steps=1", "checkpoint.keep=1000",
]  # fmt: skip
PER_EPOCH = ROWS // 10


def _write(path: Path, absurd: range) -> Path:
    """Instances with the features of their label; the values of some are finite, but their sums are not."""
    lines = [f"{ROWS} {FEATURES} {LABELS}"]
    for row in range(ROWS):
        label, value = row % LABELS, 3.3e38 if row in absurd else 0.5
        lines.append(f"{label} " + " ".join(f"{i}:{value + (0 if value > 1 else i / 100)}" for i in range(FEATURES)))
    path.write_text("\n".join(lines) + "\n")
    return path


def _make_store(folder: Path, absurd: range) -> Path:
    out = folder / f"store-{len(absurd)}"
    file = _write(folder / f"train-{len(absurd)}.txt", absurd)
    convert([file], out, format="xc-bow", tokenizer="bow", workers=1, report=lambda line: None)
    return out


@pytest.fixture(scope="module")
def bow_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of features, one instance of which gives an embedding that is not finite."""
    return _make_store(tmp_path_factory.mktemp("features"), range(17, 18))


@pytest.fixture(scope="module")
def absurd_step(bow_store: Path) -> int:
    """The first step, counted from 1, whose batch holds that instance."""
    keys = load_config(None, KEYS)
    with StreamLoader(bow_store, batch=10, seed=keys.seed, block_labels=1024, config=keys.loader) as loader:
        weights = [batch.weight_BT for batch, _ in zip(loader, range(PER_EPOCH), strict=False)]
    (found,) = [number for number, w in enumerate(weights, 1) if w is not None and w.abs().max() > 1e38]
    assert found > 2, "the attack needs a checkpoint from before"
    return found


def _train(store: Path, out: Path, *keys: str) -> list[str]:
    said: list[str] = []
    assert train(store, out, load_config(None, [*KEYS, *keys]), report=said.append) == 0
    return said


def _state(run: Path, step: int) -> dict:
    return json.loads((checkpoint_folder(run, step) / "state.json").read_text())


def test_by_default_training_stops_and_names_the_step(bow_store: Path, tmp_path: Path, absurd_step: int) -> None:
    keys = load_config(None, [*KEYS, "checkpoint.every_steps=0"])
    with pytest.raises(Diverged, match=f"^step {absurd_step}: the training diverged .*its embeddings"):
        train(bow_store, tmp_path / "run", keys, report=lambda line: None)
    assert checkpoint_steps(tmp_path / "run") == []


@pytest.mark.parametrize(
    "keys",
    [
        ["classifier.format=fp32", "train.micro_batch=4"],
        ["classifier.format=bf16", "encoder.format=bf16", "encoder.hidden=48"],
        ["classifier.kahan_head=0.5", "optimizer.states=8bit", "optimizer.offload=true"],
    ],
)
def test_a_skipped_step_leaves_every_bit_as_it_was(
    bow_store: Path, tmp_path: Path, absurd_step: int, keys: list[str]
) -> None:
    run = tmp_path / "run"
    said = _train(bow_store, run, "train.on_nonfinite=skip", "train.epochs=1", *keys)
    steps = checkpoint_steps(run)
    files = {step: tensor_files(run, step) for step in steps}
    assert [two for one, two in itertools.pairwise(steps) if files[one] == files[two]] == [absurd_step]
    assert _state(run, absurd_step)["optimizer"] == _state(run, absurd_step - 1)["optimizer"]
    assert [line for line in said if line.startswith(f"step {absurd_step} was left out (not finite: its embeddings)")]
    metrics = metrics_of(run)
    assert metrics[-1]["skipped"] == 1
    forget_after(run, absurd_step - 1)
    assert resume(run, report=lambda line: None) == 0
    assert {step: tensor_files(run, step) for step in checkpoint_steps(run)} == files and metrics_of(run) == metrics


def test_what_is_skipped_is_told_apart_from_what_is_lost(tmp_path: Path) -> None:
    store = _make_store(tmp_path, range(ROWS))
    with pytest.raises(Diverged, match=r"^step 1: the training diverged .*50 steps in a row"):
        _train(store, tmp_path / "run", "train.on_nonfinite=skip", "train.epochs=10", "checkpoint.every_steps=1000")


def test_watching_changes_no_bit_of_a_training_that_stays_finite(tmp_path: Path) -> None:
    store, ends = _make_store(tmp_path, range(0)), []
    for choice in ("stop", "skip", "rollback"):
        keys = [f"train.on_nonfinite={choice}", "encoder.hidden=48", "train.steps=4", "checkpoint.every_steps=1000"]
        _train(store, tmp_path / choice, *keys)
        ends.append((tensor_files(tmp_path / choice, 4), metrics_of(tmp_path / choice)))
    assert ends[0] == ends[1] == ends[2]


def test_a_rollback_goes_on_behind_the_batch_and_resumes_exactly(
    bow_store: Path, tmp_path: Path, absurd_step: int
) -> None:
    keys = ["train.on_nonfinite=rollback", "checkpoint.every_steps=2", "encoder.format=bf16"]
    whole, run = tmp_path / "whole", tmp_path / "run"
    said = _train(bow_store, whole, *keys)
    before = (absurd_step - 1) // 2 * 2
    assert any(f"going back to the weights of step {before}, and on with" in line for line in said)
    assert tensor_files(whole, absurd_step) == tensor_files(whole, before)
    assert _state(whole, absurd_step)["loader"]["instances_seen"] == 10 * absurd_step
    shutil.copytree(whole, run)
    forget_after(run, absurd_step)
    assert resume(run, report=lambda line: None) == 0
    assert tensor_files(run, 2 * PER_EPOCH) == tensor_files(whole, 2 * PER_EPOCH) and metrics_of(run) == metrics_of(
        whole
    )


def test_a_rollback_needs_a_checkpoint_that_training_wrote_since_the_one_before(
    bow_store: Path, tmp_path: Path, absurd_step: int
) -> None:
    keys = [*KEYS, "train.on_nonfinite=rollback", "checkpoint.every_steps=1000"]
    with pytest.raises(Diverged, match=f"^step {absurd_step}: the training diverged"):
        _train(bow_store, tmp_path / "none", *keys)
    _train(bow_store, tmp_path / "start", "train.steps=2")
    warm, said = tmp_path / "warm", list[str]()  # it has a checkpoint of step 0, and meets the batch in each epoch
    with pytest.raises(Diverged) as stopped:
        train(bow_store, warm, load_config(None, keys), init_from=tmp_path / "start", report=said.append)
    assert sum("going back to the weights of step 0," in line for line in said) == 1
    assert PER_EPOCH < stopped.value.step <= 2 * PER_EPOCH and checkpoint_steps(warm) == [0, absurd_step]


@pytest.fixture(scope="module")
def skipping(bow_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that leaves steps out."""
    out = tmp_path_factory.mktemp("skipping") / "run"
    _train(bow_store, out, "train.on_nonfinite=skip", "train.steps=1")
    return open_run(out)


@pytest.mark.parametrize(
    ("dtype", "states", "offload"),
    [
        (torch.float32, "fp32", False),
        (torch.float32, "8bit", True),
        (torch.bfloat16, "bf16", False),
        (torch.bfloat16, "fp32", False),
    ],
)
def test_gradients_that_are_not_finite_leave_the_encoder_as_it_was(
    skipping: Run, dtype: torch.dtype, states: str, offload: bool
) -> None:
    watch = FiniteWatch(skipping, 0, torch.zeros(2, dtype=torch.int64), lambda line: None)
    torch.manual_seed(3)
    encoder = torch.nn.Linear(37, 9).to(dtype)
    optimizer = build_optimizer(encoder, OptimizerConfig(encoder_lr=0.1, states=states, offload=offload), skips=True)
    assert optimizer is not None
    seen = []
    for step, spoilt in enumerate([None, torch.inf, torch.nan, 1e25, None]):
        for parameter in encoder.parameters():
            parameter.grad = torch.randn_like(parameter)
        if spoilt is not None:
            encoder.bias.grad[-1] = spoilt  # type: ignore[index]
        watch.gradients(step, optimizer)
        optimizer.step()
        tensors, counters = optimizer_tensors(optimizer)
        now = [tensor.detach().clone() for tensor in (*encoder.parameters(), *tensors.values())]
        seen.append((now, counters))
    same = [
        all(torch.equal(a, b) for a, b in zip(one, two, strict=True)) and counts == counts_after
        for (one, counts), (two, counts_after) in itertools.pairwise(seen)
    ]
    assert same == [True, True, True, False]
    assert not watch.look(4) and watch.skipped == 3
