"""Small cases that every backend runs, and what they leave behind. The processes of a comparison import this file."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import elmo_kernels as ek
import torch
from torch import Tensor

OFFSET, LABELS_AFTER = 2048, 1500
PRIOR = -0.75


@dataclass(frozen=True)
class Case:
    """One combination of what an update can be asked for, and (labels, batch, features).

    ``exceptional``: half of the rows get steps that are not finite or leave the range of fp8; in a chunk of less
    than a block all do, for an embedding is not finite. A case without a ``rate`` of learning changes nothing.
    """

    fmt: str
    rounding: str
    loss: str
    kahan_rows: int = 0
    shape: tuple[int, int, int] = (1100, 5, 48)
    exceptional: bool = False
    rate: float = 0.3

    @property
    def name(self) -> str:
        """Unique among the cases."""
        size = "x".join(map(str, self.shape))
        return f"{self.fmt}-{self.rounding}-{self.loss}-{self.kahan_rows}-{size}-{self.exceptional}"


CASES = [
    Case("fp32", "stochastic", "bce"),
    Case("bf16", "nearest", "bce", kahan_rows=500),
    Case("fp8", "stochastic", "bce", kahan_rows=500),
    Case("fp8", "stochastic", "squared_hinge", shape=(1013, 37, 80)),
    Case("fp8", "stochastic", "bce", kahan_rows=20, shape=(70, 130, 144)),
    Case("bf16", "stochastic", "bce", shape=(1024, 16, 128)),
    Case("fp8", "stochastic", "bce", shape=(1024, 16, 128)),
    Case("bf16", "stochastic", "bce", 1100, (1300, 5, 48), exceptional=True),
    Case("fp8", "stochastic", "bce", 1100, (1300, 5, 144), exceptional=True),
    Case("bf16", "stochastic", "bce", 20, (60, 5, 144), exceptional=True, rate=0.0),
    Case("fp8", "stochastic", "bce", 20, (60, 5, 144), exceptional=True, rate=0.0),
    Case("fp8", "nearest", "bce", shape=(90, 130, 144), exceptional=True),
]
LARGE_CASES = [
    Case(fmt, "stochastic", "bce", 300, (1013, 37, dim)) for fmt in ("bf16", "fp8") for dim in (384, 768, 1024)
]


def case_inputs(case: Case) -> dict[str, Tensor]:
    """A batch with soft targets, whose positives lie before, in and after the chunk.

    Embeddings and the gradient of the step are small binary fractions, so their products are exact in any
    order of summation, and new weights can be compared by their bytes.
    """
    generator = torch.Generator().manual_seed(5)
    labels, batch, dim = case.shape
    all_labels = OFFSET + labels + LABELS_AFTER
    pair_P = torch.randperm(all_labels * batch, generator=generator)[:300].sort().values
    end = OFFSET + labels  # of the chunk; only the last chunk of a model ends within a label block
    pair_P = pair_P[(pair_P // batch < end) | (pair_P // batch >= -(-end // ek.BLOCK_LABELS) * ek.BLOCK_LABELS)]
    blocks = -(-all_labels // ek.BLOCK_LABELS)
    x_BD = torch.randint(-16, 17, (batch, dim), generator=generator) / 16
    step_g_LB = torch.randint(-16, 17, (labels, batch), generator=generator) / 32
    if case.exceptional:
        x_BD[0, -1] = torch.inf if labels < 1024 else 0.5
        large_LB = torch.zeros(labels, batch)
        large_LB[:, 0] = torch.tensor([2.0**18, torch.inf, torch.nan])[torch.arange(labels) % 3]
        step_g_LB = torch.where(torch.rand(labels, 1, generator=generator) < 0.5, large_LB, step_g_LB)
    return {
        "x_BD": x_BD,
        "step_g_LB": step_g_LB,
        "label_P": pair_P // batch,
        "instance_P": pair_P % batch,
        "weight_P": torch.rand(len(pair_P), generator=generator).clamp(min=0.05),
        "block_ptr": torch.searchsorted(pair_P // batch, torch.arange(blocks + 1) * ek.BLOCK_LABELS),
    }


def case_weights(case: Case, device: str = "cpu") -> ek.ChunkWeights:
    """The chunk of a case before its step."""
    labels, _, dim = case.shape
    weights = {"seed": 11, "std": 0.03, "kahan_rows": case.kahan_rows, "device": device}
    return ek.make_chunk(case.fmt, labels, dim, OFFSET, **weights)  # type: ignore[arg-type]


def run_case(case: Case, device: str = "cpu") -> dict[str, Tensor]:
    """Gradient, loss, one large step (so that fp8 groups grow out of their exponents), top-k."""
    inputs = {name: tensor.to(device) for name, tensor in case_inputs(case).items()}
    w, batch = case_weights(case, device), case.shape[1]
    x_BD, positives = ek.operand(inputs["x_BD"], case.fmt), SimpleNamespace(**inputs)
    g_LB, loss = ek.logit_grad(w, x_BD, positives, loss=case.loss, prior=PRIOR, want_loss=True)
    assert loss is not None
    rounded: dict[str, Tensor] = {}
    if case.fmt == "fp8":
        x = ek.fp8_operand(x_BD)
        rounded = x._asdict()
    if case.fmt == "fp8" and device == "cpu":  # a GPU before sm_89 has no such products
        fp8_g_LB, fp8_loss = ek.logit_grad(w, x, positives, loss=case.loss, prior=PRIOR, want_loss=True)
        assert fp8_loss is not None
        rounded |= {"fp8_g_LB": fp8_g_LB, "fp8_loss": fp8_loss}
    scores_BK = torch.full((3, 7), -torch.inf, device=device)
    ids_BK = torch.full((3, 7), -1, device=device)
    ek.topk_merge_(scores_BK, ids_BK, w, x_BD[:3])
    dx_BD = torch.ones(batch, case.shape[2], device=device)
    flags = torch.zeros(2, dtype=torch.int64, device=device)
    ek.update_(
        w, inputs["step_g_LB"].to(x_BD.dtype), x_BD, dx_BD,
        lr=case.rate, weight_decay=0.01, rounding=case.rounding, seed=-3, step=1 << 40, flags=flags,
    )  # fmt: skip
    out = {"g_LB": g_LB, "loss": loss, "dx_BD": dx_BD, "flags": flags, "scores_BK": scores_BK, "ids_BK": ids_BK}
    return {name: tensor.cpu() for name, tensor in {**out, **rounded, **_parts(w)}.items()}


def _parts(w: ek.ChunkWeights) -> dict[str, Tensor]:
    named = {"data_LD": w.data_LD, "exponent_LG": w.exponent_LG, "comp_HD": w.comp_HD}
    return {name: tensor for name, tensor in named.items() if tensor is not None}


PAIRS = [
    ("fp32", "nearest", 0.0), ("bf16", "stochastic", 0.0), ("bf16", "nearest", 0.0), ("bf16", "stochastic", 0.5),
    ("fp8", "stochastic", 0.0), ("fp8", "nearest", 0.0), ("fp8", "stochastic", 0.5),
]  # fmt: skip


def run_pairs(labels: int, device: str = "cpu") -> dict[str, Tensor]:
    """``labels * 256`` random (weight, update) pairs of all exponents for each of ``PAIRS``, and what they become.

    The batch has one instance, and its numbers are bf16, so updates are the same bits in any product. Some are not
    finite, and some steps leave the range of fp8.
    """
    dim, out = 256, {}
    for fmt, rounding, head in PAIRS:
        random = torch.Generator().manual_seed(labels)

        def integers(low: int, high: int, *shape: int) -> Tensor:
            return torch.randint(low, high, shape, generator=random)  # noqa: B023

        w = ek.empty_chunk(fmt, labels, dim, 4096, kahan_rows=int(head * labels))
        g_L = torch.randn(labels, 1, generator=random) * 2.0 ** integers(-105, 16, labels, 1)
        g_L[::97] = torch.tensor([torch.inf, -torch.inf, torch.nan, 3e38, -3e38])[integers(0, 5, len(g_L[::97]), 1)]
        x_D = torch.randn(1, dim, generator=random) * 2.0 ** integers(-8, 8, 1, dim)
        if fmt == "fp8":
            near = g_L.abs().log2().nan_to_num(0, 99, -99) + integers(-10, 0, labels, dim // 128)
            far = integers(-100, 7, labels, dim // 128)
            assert w.exponent_LG is not None
            w.exponent_LG.copy_(torch.where(torch.arange(labels)[:, None] % 2 == 0, near, far).clamp(-100, 6))
            w.data_LD.copy_(integers(0, 127, labels, dim) + 128 * integers(0, 2, labels, dim))
        else:
            value = torch.randn(labels, dim, generator=random) * 2.0 ** integers(-120, 120, labels, dim)
            w.data_LD.copy_(value)
        if w.comp_HD is not None:
            w.comp_HD.copy_(ek.dequantize(w)[: len(w.comp_HD)] * 2.0**-6)
        step: dict[str, Any] = {"lr": 0.37, "weight_decay": 0.01, "rounding": rounding, "seed": 3, "step": 5}
        w = ek.ChunkWeights(w.fmt, *(None if t is None else t.to(device) for t in _tensors(w)), w.label_offset)
        kind = ek.operand(torch.empty(1, 1, device=device), fmt).dtype
        g, x = (tensor.bfloat16().to(device, kind) for tensor in (g_L, x_D))
        flags = torch.zeros(2, dtype=torch.int64, device=device)
        ek.update_(w, g, x, torch.zeros(1, dim, device=device), flags=flags, **step)
        name = f"{fmt}-{rounding}-{head}"
        out.update({f"{name}.{part}": tensor.cpu() for part, tensor in {**_parts(w), "flags": flags}.items()})
    return out


def _tensors(w: ek.ChunkWeights) -> list[Tensor | None]:
    return [w.data_LD, w.exponent_LG, w.comp_HD]
