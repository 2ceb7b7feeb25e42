"""A step that is launched as one CUDA graph is the step: same bytes, whatever the batch, and it never waits."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from elmo_kernels import BLOCK_LABELS
from torch import Tensor

from elmo_stream.config import ClassifierConfig
from elmo_stream.data.batch import Positives, sort_positives
from elmo_stream.model.classifier import ChunkedClassifier
from elmo_stream.model.graph import NO_LABEL, PaddedPositives, StepGraphs

LABELS, DIM, STEPS, LAST = 4500, 144, 20, 14
FORMATS = [
    {"format": "fp32"},
    {"format": "bf16", "rounding": "kahan"},
    {"format": "fp8", "kahan_head": 0.3},
    {"format": "fp8", "loss": "squared_hinge"},
    pytest.param(
        {"format": "fp8", "fp8_logits": True},
        marks=pytest.mark.skipif(
            torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9), reason="begins with sm_89"
        ),
    ),
]


def _batch(step: int, device: str) -> tuple[Tensor, Positives]:
    """37 instances, or fewer in steps 9 and 19, as at the end of an epoch; from none to hundreds of positives."""
    rng = np.random.default_rng(step)
    size, most = (LAST if step % 10 == 9 else 37), (1, 8, 40)[step % 3]
    rows = [np.sort(rng.choice(LABELS, rng.integers(0, most), replace=False)) for _ in range(size)]
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
    x_BD = torch.from_numpy(rng.standard_normal((size, DIM)).astype(np.float32)).to(device)
    found = sort_positives(np.concatenate(rows), offsets, num_labels=LABELS, block_labels=BLOCK_LABELS)
    return x_BD, Positives(*(getattr(found, name).to(device) for name in Positives.__slots__))


@dataclass
class _Run:
    classifier: ChunkedClassifier
    device: str

    def step(self, step: int) -> Tensor:
        x_BD, positives = _batch(step, self.device)
        lr = 0.1 * (1 - step / STEPS)
        return self.classifier.train_step(x_BD, positives, lr=lr, step=step, want_loss=step == 5)[0].clone()

    def tensors(self) -> list[Tensor]:
        return [tensor for *_, part in self.classifier.state_chunks() for tensor in part.values()]


def _run(keys: dict[str, object], device: str, *, graphs: bool) -> _Run:
    config = ClassifierConfig(chunk_labels=2048, **keys)  # type: ignore[arg-type]
    classifier = ChunkedClassifier(LABELS, DIM, config, prior=0.01, seed=3, device=torch.device(device))
    classifier._graphs = StepGraphs() if graphs else None
    return _Run(classifier, device)


def _assert_same(one: _Run, other: _Run) -> None:
    assert all(a.equal(b) for a, b in zip(one.tensors(), other.tensors(), strict=True))


def test_padding_keeps_the_pairs_in_order_and_behind_every_pointer() -> None:
    padded = None
    for step in (2, 1, 0, 5):
        _, positives = _batch(step, "cpu")
        count = len(positives.label_P)
        padded = padded or PaddedPositives.empty_like(positives)
        padded.fill_(positives)
        assert len(padded.label_P) == 1024 and (count == 0) == (step == 0)
        for name in ("label_P", "instance_P", "weight_P"):
            assert getattr(padded, name)[:count].equal(getattr(positives, name)), name
        assert (padded.label_P[count:] == NO_LABEL).all()
        assert padded.block_ptr.equal(positives.block_ptr) and padded.block_ptr[-1] == count


@pytest.mark.skipif(torch.cuda.is_available(), reason="shows what happens where no graph can be captured")
@pytest.mark.parametrize("backend", ["reference", "numba"])
def test_where_no_graph_can_be_captured_steps_go_on_and_say_so_once(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ELMO_KERNELS", backend)
    plain, padded = (_run({"format": "fp8"}, "cpu", graphs=graphs) for graphs in (False, True))
    with pytest.warns(UserWarning, match="no CUDA graph of the classifier's step") as said:
        for step in range(6):
            assert padded.step(step).equal(plain.step(step))
    assert len(said) == 1
    _assert_same(padded, plain)


@pytest.mark.gpu
@pytest.mark.parametrize("keys", FORMATS, ids=lambda keys: "-".join(map(str, keys.values())))
def test_replayed_steps_leave_the_same_bytes(keys: dict[str, object]) -> None:
    plain, replayed = (_run(keys, "cuda", graphs=graphs) for graphs in (False, True))
    for step in range(STEPS):
        assert replayed.step(step).equal(plain.step(step)), step
    _assert_same(replayed, plain)
    assert replayed.classifier.flags.equal(plain.classifier.flags)
    shapes = replayed.classifier._graphs._shapes  # type: ignore[union-attr]
    assert len(shapes) == 3 and sum(shape.graph is not None for shape in shapes.values()) >= 2


@pytest.mark.gpu
def test_a_replay_never_waits_for_the_gpu() -> None:
    config = ClassifierConfig(chunk_labels=2048)
    classifier = ChunkedClassifier(LABELS, DIM, config, prior=0.01, seed=3, device=torch.device("cuda"))
    batches = [_batch(step, "cuda") for step in (2, 5, 8, 11)]
    try:
        for step, (x_BD, positives) in enumerate(batches):
            if step == 2:
                assert classifier._graphs is not None
                assert all(shape.graph is not None for shape in classifier._graphs._shapes.values())
                torch.cuda.set_sync_debug_mode("error")
            dx_BD, _ = classifier.train_step(x_BD, positives, lr=0.1, step=step)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert dx_BD.abs().sum() > 0


@pytest.mark.gpu
def test_more_shapes_than_graphs_are_kept_for_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("elmo_stream.model.graph.MAX_GRAPHS", 1)
    plain, replayed = (_run({"format": "fp8"}, "cuda", graphs=graphs) for graphs in (False, True))
    for step in range(STEPS):
        assert replayed.step(step).equal(plain.step(step)), step
    _assert_same(replayed, plain)
