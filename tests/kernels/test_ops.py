"""The classifier's step is the right one: exact gradients, old weights for dx, and no trace of the chunk size."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import elmo_kernels as ek
import pytest
import torch
from elmo_kernels.reference import products
from torch import Tensor

SHAPES = [(1, 1, 16), (1013, 37, 80), (2500, 33, 144), (1013, 37, 768)]
FORMATS = tuple(ek.FORMATS)


def _update(w: ek.ChunkWeights, g_LB: Tensor, x_BD: Tensor, **changes: Any) -> tuple[Tensor, Tensor]:
    """One update; (dx_BD, flags)."""
    dx_BD, flags = torch.zeros_like(x_BD), torch.zeros(2, dtype=torch.int64)
    settings = {"lr": 0.05, "weight_decay": 0.0, "rounding": "stochastic", "seed": 1, "step": 2, **changes}
    ek.update_(w, g_LB, x_BD, dx_BD, flags=flags, **settings)
    return dx_BD, flags


def _fp32_chunk(w_LD: Tensor) -> ek.ChunkWeights:
    return ek.ChunkWeights("fp32", w_LD.clone(), None, None, 0)


def _gold_loss(loss: str, z_LB: Tensor, y_LB: Tensor) -> Tensor:
    if loss == "bce":
        return torch.nn.functional.binary_cross_entropy_with_logits(z_LB, y_LB, reduction="sum")
    return (y_LB * (1 - z_LB).clamp(min=0) ** 2 + (1 - y_LB) * (1 + z_LB).clamp(min=0) ** 2).sum()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("loss", list(ek.LOSSES))
def test_gradients_are_as_good_as_torch_at_the_same_precision(
    cpu_backend: str, fmt: str, loss: str, shape: tuple[int, int, int], make_batch: Callable
) -> None:
    (labels, size, dim), prior = shape, -1.25
    batch = make_batch(labels, size, dim, soft=True)
    w = ek.make_chunk(fmt, labels, dim, 0, seed=3, std=0.2)
    w_LD, y_LB = ek.dequantize(w), batch.targets(labels)
    gold_w, gold_x = w_LD.double().requires_grad_(), batch.x_BD.double().requires_grad_()
    z_LB = gold_w @ gold_x.T + prior
    z_LB.retain_grad()
    gold = _gold_loss(loss, z_LB, y_LB)
    gold.backward()

    torch_x = batch.x_BD.clone().requires_grad_()
    with products(fmt):
        torch_z = w_LD @ torch_x.T + prior
        torch_z.retain_grad()
        torch_loss = _gold_loss(loss, torch_z, y_LB.float())
        torch_loss.backward()

    g_LB, value = ek.logit_grad(w, batch.x_BD, batch, loss=loss, prior=prior, want_loss=True)
    dx_BD, _ = _update(w, g_LB, batch.x_BD, lr=0.0)
    assert value is not None
    pairs = ((value, torch_loss, gold), (g_LB, torch_z.grad, z_LB.grad), (dx_BD, torch_x.grad, gold_x.grad))
    for mine, theirs, exact in pairs:
        assert theirs is not None and exact is not None and exact.abs().max() > 0
        scale = exact.abs().max()
        assert (mine - exact).abs().max() <= 2 * (theirs - exact).abs().max() + 1e-6 * scale


def test_the_step_of_the_reference_document_is_reproduced(cpu_backend: str, make_batch: Callable) -> None:
    """The FP64 vector of a hand-checked BCE step, its three features padded by zeros."""
    x_BD, w_LD = torch.zeros(2, 16), torch.zeros(5, 16)
    x_BD[:, :3] = torch.tensor([[0.5, -1, 2], [1, 0.25, -0.5]])
    w_LD[:, :3] = torch.tensor([[1, 0, -1], [0.5, 0.5, 0.5], [-2, 1, 0], [0, 3, 1], [1, 1, 1.0]])
    template = make_batch(5, 2, 16)
    batch = type(template)(x_BD, torch.tensor([1, 3, 4]), torch.tensor([0, 0, 1]), torch.ones(3), torch.tensor([0, 3]))
    w = _fp32_chunk(w_LD)
    g_LB, loss = ek.logit_grad(w, x_BD, batch, loss="bce", want_loss=True)
    dx_BD, _ = _update(w, g_LB, x_BD, lr=1.0)
    assert loss is not None and abs(loss.item() - 7.702458379196) < 1e-6
    gz = [[0.182426, -0.320821, 0.119203, -0.731059, 0.817574], [0.817574, 0.592667, 0.148047, 0.562177, -0.320821]]
    gw = [[0.908787, 0.021968, -0.043936], [0.432256, 0.468988, -0.937976], [0.207649, -0.082191, 0.164382],
          [0.196647, 0.871603, -1.743205], [0.087966, -0.89778, 1.79556]]  # fmt: skip
    gx = torch.tensor([[0.601184, -1.416809, -0.25632], [0.496992, 1.810089, -0.279886]])
    torch.testing.assert_close(g_LB, torch.tensor(gz).T, rtol=0, atol=1e-6)
    torch.testing.assert_close(dx_BD[:, :3], gx, rtol=0, atol=2e-6)
    torch.testing.assert_close((w_LD - w.data_LD)[:, :3], torch.tensor(gw), rtol=0, atol=2e-6)
    assert (w.data_LD[:, 3:] == 0).all()


def test_a_confident_positive_still_gets_its_tiny_gradient(cpu_backend: str, make_batch: Callable) -> None:
    batch = make_batch(1, 1, 16)
    w = _fp32_chunk(20 * batch.x_BD / batch.x_BD.square().sum())
    g_LB, _ = ek.logit_grad(w, batch.x_BD, batch, loss="bce")
    torch.testing.assert_close(g_LB.double(), -torch.sigmoid(torch.tensor([[-20.0]])).double(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("fmt", FORMATS)
def test_the_embedding_gradient_uses_the_weights_from_before_the_step(
    cpu_backend: str, fmt: str, make_batch: Callable
) -> None:
    batch = make_batch(1500, 8, 32)
    w = ek.make_chunk(fmt, 1500, 32, 0, seed=4, std=0.1)
    before_LD = ek.dequantize(w)
    g_LB, _ = ek.logit_grad(w, batch.x_BD, batch, loss="bce")
    dx_BD, _ = _update(w, g_LB, batch.x_BD)
    with products(fmt):
        torch.testing.assert_close(dx_BD, g_LB.T @ before_LD, rtol=1e-5, atol=1e-4)
        assert (dx_BD - g_LB.T @ ek.dequantize(w)).abs().max() > 1


CUTS = {"1024": (1024, 2048, 3072, 4096), "4096": (4096,), "all": ()}
CONFIGURATIONS = [
    ("fp32", "stochastic", 0), ("bf16", "stochastic", 0), ("bf16", "nearest", 0), ("bf16", "stochastic", 1500),
    ("fp8", "stochastic", 0), ("fp8", "nearest", 0), ("fp8", "stochastic", 1500),
]  # fmt: skip


def _train(fmt: str, rounding: str, kahan_rows: int, cuts: tuple[int, ...], make_batch: Callable) -> dict[str, Tensor]:
    labels, size, dim, steps = 4500, 9, 32, 2
    edges = (0, *cuts, labels)
    chunks = [
        ek.make_chunk(fmt, b - a, dim, a, seed=6, std=0.05, kahan_rows=max(0, min(kahan_rows, b) - a))
        for a, b in pairwise(edges)
    ]
    flags = torch.zeros(2, dtype=torch.int64)
    for step in range(steps):
        batch = make_batch(labels, size, dim, seed=step)
        dx_BD = torch.zeros(size, dim)
        for w in chunks:
            g_LB, _ = ek.logit_grad(w, batch.x_BD, batch, loss="bce")
            ek.update_(
                w, g_LB, batch.x_BD, dx_BD, lr=0.5, weight_decay=1e-3, rounding=rounding, seed=9, step=step, flags=flags
            )
    scores_BK, ids_BK = torch.full((size, 20), -torch.inf), torch.full((size, 20), -1)
    for w in chunks:
        ek.topk_merge_(scores_BK, ids_BK, w, batch.x_BD)
    weights = torch.cat([ek.dequantize(w) for w in chunks])
    comp = [w.comp_HD.float() for w in chunks if w.comp_HD is not None]
    out = {"weights": weights, "dx": dx_BD, "scores": scores_BK, "ids": ids_BK, "flags": flags}
    return out | ({"comp": torch.cat(comp)} if comp else {})


@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=str)
def test_the_chunk_size_leaves_no_trace_in_weights_gradient_and_predictions(
    cpu_backend: str, configuration: tuple[str, str, int], make_batch: Callable
) -> None:
    whole, *others = (_train(*configuration, cuts, make_batch) for cuts in reversed(CUTS.values()))
    for other in others:
        for name, tensor in whole.items():
            assert tensor.equal(other[name]), name


def test_positives_of_other_chunks_touch_nothing(cpu_backend: str, make_batch: Callable) -> None:
    batch = make_batch(3072, 16, 16)
    w = ek.make_chunk("fp32", 1024, 16, 1024, seed=1, std=0.1)
    g_LB, _ = ek.logit_grad(w, batch.x_BD, batch, loss="bce")
    y_LB = batch.targets(3072)[1024:2048]
    assert 0 < y_LB.sum() < len(batch.label_P)
    torch.testing.assert_close(g_LB, (ek.dequantize(w) @ batch.x_BD.T).sigmoid() - y_LB.float(), rtol=0, atol=1e-6)


def test_equal_scores_go_to_the_lower_label_and_short_lists_are_marked(cpu_backend: str) -> None:
    w_LD = torch.ones(1030, 16)
    w_LD[[5, 1026]] = 2.0
    w_LD[7], w_LD[9] = -torch.inf, torch.nan
    scores_BK, ids_BK = torch.full((2, 6), -torch.inf), torch.full((2, 6), -1)
    ek.topk_merge_(scores_BK, ids_BK, _fp32_chunk(w_LD), torch.ones(2, 16))
    assert ids_BK.tolist() == [[5, 1026, 0, 1, 2, 3]] * 2
    assert scores_BK[0].tolist() == [32.0, 32.0, 16.0, 16.0, 16.0, 16.0]
    few_scores, few_ids = torch.full((2, 6), -torch.inf), torch.full((2, 6), -1)
    few = torch.zeros(3, 16)
    few[1], few[2] = -1.0, -0.0
    ek.topk_merge_(few_scores, few_ids, _fp32_chunk(few), torch.ones(2, 16))
    assert few_ids.tolist() == [[0, 2, 1, -1, -1, -1]] * 2


@pytest.mark.parametrize(("fmt", "change"), [("bf16", 1e-4), ("fp8", 2e-3)])
def test_compensation_keeps_tiny_updates_that_nearest_rounding_loses(cpu_backend: str, fmt: str, change: float) -> None:
    dim, steps = 16, 200
    x_BD, g_LB = torch.ones(1, dim), torch.full((4, 1), -change)
    moved = {}
    for kahan_rows in (0, 4):
        w = ek.make_chunk(fmt, 4, dim, 0, seed=8, std=0.5, kahan_rows=kahan_rows)
        before_LD = ek.dequantize(w)
        large = before_LD.abs() > 0.3
        for step in range(steps):
            _update(w, g_LB, x_BD, lr=1.0, rounding="nearest", step=step)
        moved[kahan_rows] = (ek.dequantize(w) - before_LD)[large].mean().item()
    assert moved[0] == 0
    assert moved[4] == pytest.approx(steps * change, rel=0.1)


@pytest.mark.parametrize("fmt", FORMATS)
def test_weight_decay_shrinks_weights_in_every_format(cpu_backend: str, fmt: str, make_batch: Callable) -> None:
    w = ek.make_chunk(fmt, 1024, 64, 0, seed=8, std=0.05)
    before_LD = ek.dequantize(w)
    for step in range(10):
        _update(w, torch.zeros(1024, 1), torch.ones(1, 64), lr=0.1, weight_decay=0.1, step=step)
    ratio = (ek.dequantize(w) * before_LD).sum() / before_LD.square().sum()
    assert ratio.item() == pytest.approx(0.99**10, abs=2e-3)


def test_a_row_that_grows_keeps_its_shape_instead_of_saturating(cpu_backend: str) -> None:
    w = ek.make_chunk("fp8", 64, 64, 0, seed=8, std=0.01)
    before_LD = ek.dequantize(w)
    flags = torch.zeros(2, dtype=torch.int64)
    for step in range(12):
        flags += _update(w, torch.zeros(64, 1), torch.ones(1, 64), lr=1.0, weight_decay=-0.5, step=step)[1]
    ratio = (ek.dequantize(w) * before_LD).sum() / before_LD.square().sum()
    assert ratio.item() == pytest.approx(1.5**12, rel=0.01)
    assert flags.tolist() == [0, 0]


@pytest.mark.parametrize("fmt", FORMATS)
def test_a_broken_step_is_counted_and_fp8_keeps_its_weights(cpu_backend: str, fmt: str) -> None:
    w = ek.make_chunk(fmt, 10, 16, 0, seed=8, std=0.05)
    before_LD = ek.dequantize(w)
    g_LB = torch.zeros(10, 1)
    g_LB[3], g_LB[4] = torch.nan, -torch.inf
    _, flags = _update(w, g_LB, torch.ones(1, 16))
    assert flags.tolist() == [0, 32]
    if fmt == "fp8":
        assert ek.dequantize(w)[3:5].equal(before_LD[3:5])


def test_a_step_beyond_the_range_of_the_exponents_is_counted(cpu_backend: str) -> None:
    w = ek.make_chunk("fp8", 10, 16, 0, seed=8, std=0.05)
    g_LB = torch.zeros(10, 1)
    g_LB[3] = -1e6
    assert _update(w, g_LB, torch.ones(1, 16), lr=1.0)[1].tolist() == [16, 0]


@pytest.mark.parametrize("fmt", FORMATS)
def test_first_weights_are_normal_like_never_all_zero_and_free_of_the_chunking(fmt: str) -> None:
    w = ek.make_chunk(fmt, 3000, 64, 0, seed=1, std=1e-4)
    w_LD = ek.dequantize(w)
    assert w_LD.std().item() == pytest.approx(1e-4, rel=0.02)
    assert abs(w_LD.mean().item()) < 1e-6
    assert (w_LD == 0).float().mean() < 0.01
    assert w_LD[1024:].equal(ek.dequantize(ek.make_chunk(fmt, 1976, 64, 1024, seed=1, std=1e-4)))
    assert not w_LD.equal(ek.dequantize(ek.make_chunk(fmt, 3000, 64, 0, seed=2, std=1e-4)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("int4", 10, 16, 0), "format is 'int4'; choose one of fp32, bf16, fp8"),
        (("fp8", 10, 24, 0), "embedding size is 24; it must be a positive multiple of 16"),
        (("fp8", 10, 16, 100), "label_offset is 100; it must be a multiple of 1024"),
        (("fp8", 0, 16, 0), "0 labels"),
    ],
)
def test_a_chunk_of_impossible_shape_is_refused(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ek.make_chunk(*arguments, seed=0, std=0.1)


def test_wrong_arguments_are_refused_by_name(make_batch: Callable) -> None:
    batch = make_batch(10, 2, 16)
    w = ek.make_chunk("fp8", 10, 16, 0, seed=0, std=0.1)
    with pytest.raises(ValueError, match="loss is 'hinge'; choose one of bce, squared_hinge"):
        ek.logit_grad(w, batch.x_BD, batch, loss="hinge")
    with pytest.raises(ValueError, match=r"x_BD is contiguous torch\.float64"):
        ek.logit_grad(w, batch.x_BD.double(), batch, loss="bce")
    with pytest.raises(ValueError, match="rounding is 'kahan'; choose one of stochastic, nearest"):
        _update(w, torch.zeros(10, 2), batch.x_BD, rounding="kahan")
    with pytest.raises(ValueError, match="fp32 with compensation for 3 of 10 rows"):
        ek.make_chunk("fp32", 10, 16, 0, seed=0, std=0.1, kahan_rows=3)
    with pytest.raises(ValueError, match="deviation of the first weights is nan"):
        ek.make_chunk("fp32", 10, 16, 0, seed=0, std=float("nan"))
