"""The classifier is one matrix to its user: chunks change memory, not a bit of the result."""

import math

import numpy as np
import pytest
import torch
from elmo_kernels import BLOCK_LABELS, dequantize

from elmo_stream.config import ClassifierConfig
from elmo_stream.data.batch import Positives, sort_positives
from elmo_stream.errors import UserError
from elmo_stream.model.classifier import ChunkedClassifier

LABELS, DIM, BATCH = 4500, 32, 9
CPU = torch.device("cpu")


def _classifier(**keys: object) -> ChunkedClassifier:
    return ChunkedClassifier(LABELS, DIM, ClassifierConfig(**keys), prior=0.5, seed=3, device=CPU)  # type: ignore[arg-type]


def _batch(step: int) -> tuple[torch.Tensor, Positives]:
    rng = np.random.default_rng(step)
    rows = [np.sort(rng.choice(LABELS, rng.integers(0, 6), replace=False)) for _ in range(BATCH)]
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
    x_BD = torch.from_numpy(rng.standard_normal((BATCH, DIM)).astype(np.float32))
    return x_BD, sort_positives(np.concatenate(rows), offsets, num_labels=LABELS, block_labels=BLOCK_LABELS)


def _weights(classifier: ChunkedClassifier) -> torch.Tensor:
    return torch.cat([dequantize(chunk) for chunk in classifier._chunks.walk(changed=False)])


@pytest.mark.parametrize(
    "keys",
    [
        {"format": "fp32"},
        {"format": "bf16"},
        {"format": "fp8"},
        {"format": "bf16", "rounding": "kahan"},
        {"format": "fp8", "kahan_head": 0.3},
        {"format": "fp8", "fp8_logits": True},
    ],
)
def test_chunk_size_changes_no_bit(keys: dict[str, object]) -> None:
    results = []
    for chunk_labels in (1000, 4096, LABELS):
        classifier = _classifier(chunk_labels=chunk_labels, **keys)
        for step in range(4):
            x_BD, positives = _batch(step)
            dx_BD, loss = classifier.train_step(x_BD, positives, lr=0.1, step=step, want_loss=True)
        results.append((_weights(classifier), dx_BD, loss, *classifier.topk(x_BD, 7)))
    assert len({len(_classifier(chunk_labels=size).plan.layouts) for size in (1000, 4096, LABELS)}) == 3
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_fp8_logits_change_the_steps_and_not_the_top_k() -> None:
    exact, rounded = (_classifier(format="fp8", fp8_logits=chosen) for chosen in (False, True))
    x_BD, positives = _batch(0)
    assert all(torch.equal(a, b) for a, b in zip(exact.topk(x_BD, 7), rounded.topk(x_BD, 7), strict=True))
    for classifier in (exact, rounded):
        classifier.train_step(x_BD, positives, lr=0.1, step=0)
    difference, size = (_weights(exact) - _weights(rounded)).norm(), _weights(exact).norm()
    assert 0 < difference < 0.1 * size


def test_a_step_is_gradient_descent_on_the_summed_loss() -> None:
    classifier = _classifier(format="fp32", weight_decay=0.01)
    x_BD, positives = _batch(0)
    w_LD = _weights(classifier).double().requires_grad_()
    x = x_BD.double().requires_grad_()
    target = torch.zeros(BATCH, LABELS, dtype=torch.float64)
    target[positives.instance_P, positives.label_P] = 1
    loss = torch.nn.functional.binary_cross_entropy_with_logits(x @ w_LD.T, target, reduction="sum")
    loss.backward()
    dx_BD, mine = classifier.train_step(x_BD, positives, lr=0.1, step=0, want_loss=True)
    assert w_LD.grad is not None and x.grad is not None and mine is not None
    torch.testing.assert_close(float(mine), float(loss.detach()), rtol=1e-6, atol=0)
    torch.testing.assert_close(dx_BD.double(), x.grad, rtol=1e-4, atol=1e-4)
    expected = w_LD.detach() - 0.1 * (w_LD.grad + 0.01 * w_LD.detach())
    torch.testing.assert_close(_weights(classifier).double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fmt", ["fp32", "bf16", "fp8"])
def test_training_learns_its_instances(fmt: str) -> None:
    classifier = _classifier(format=fmt)
    x_BD, positives = _batch(1)
    losses = [
        float(classifier.train_step(x_BD, positives, lr=0.05, step=step, want_loss=True)[1] or 0) for step in range(60)
    ]
    assert losses[-1] < 0.05 * losses[0]
    _, ids_BK = classifier.topk(x_BD, 1)
    truth = set(zip(positives.instance_P.tolist(), positives.label_P.tolist(), strict=True))
    with_labels = set(positives.instance_P.tolist())
    assert all((row, int(ids_BK[row])) in truth for row in with_labels)


def test_topk_is_the_dense_ranking_and_never_more_than_the_labels() -> None:
    classifier = _classifier(format="fp8", chunk_labels=1024)
    x_BD, _ = _batch(2)
    _, ids_BK = classifier.topk(x_BD, 20)
    dense = (x_BD @ _weights(classifier).T).numpy()
    for row in range(BATCH):
        expected = np.lexsort((np.arange(LABELS), -dense[row]))[:20]
        assert np.allclose(dense[row][ids_BK[row].numpy()], dense[row][expected], atol=1e-5)
    small = ChunkedClassifier(3, DIM, ClassifierConfig(), prior=0.5, seed=0, device=CPU)
    assert small.topk(x_BD, 10)[1].shape == (BATCH, 3)


def test_saved_rows_restore_every_format_in_other_chunks() -> None:
    for keys in ({"format": "fp32"}, {"format": "bf16", "rounding": "kahan"}, {"format": "fp8", "kahan_head": 0.3}):
        classifier = _classifier(chunk_labels=2048, **keys)
        x_BD, positives = _batch(0)
        classifier.train_step(x_BD, positives, lr=0.1, step=0)
        saved: dict[str, torch.Tensor] = {}
        for _, _, tensors in classifier.state_chunks():
            for name, tensor in tensors.items():
                saved[name] = torch.cat([saved[name], tensor]) if name in saved else tensor.clone()
        restored = ChunkedClassifier(
            LABELS,
            DIM,
            ClassifierConfig(chunk_labels=1024, **keys),
            prior=0.5,
            seed=99,
            device=CPU,  # type: ignore[arg-type]
            weights=lambda name, first, last, saved=saved: saved[name][first:last],
        )
        assert torch.equal(_weights(restored), _weights(classifier))
        again = [tensors for _, _, tensors in restored.state_chunks()]
        for name, tensor in saved.items():
            assert torch.equal(torch.cat([tensors[name] for tensors in again if name in tensors]), tensor)


def test_logits_start_at_the_share_of_positives() -> None:
    classifier = ChunkedClassifier(LABELS, DIM, ClassifierConfig(init_std=1e-6), prior=0.001, seed=0, device=CPU)
    x_BD, positives = _batch(0)
    scores_BK, _ = classifier.topk(x_BD, 5)
    torch.testing.assert_close(classifier.probability(scores_BK), torch.full((BATCH, 5), 0.001), rtol=1e-3, atol=0)
    _, loss = classifier.train_step(x_BD, positives, lr=0.0, step=0, want_loss=True)
    count = len(positives.label_P)
    expected = -count * math.log(0.001) - (BATCH * LABELS - count) * math.log(0.999)
    assert loss is not None
    torch.testing.assert_close(float(loss), expected, rtol=1e-4, atol=0)


def test_an_odd_embedding_is_refused() -> None:
    with pytest.raises(UserError, match="multiple of 16"):
        ChunkedClassifier(10, 20, ClassifierConfig(), prior=0.5, seed=0, device=CPU)
