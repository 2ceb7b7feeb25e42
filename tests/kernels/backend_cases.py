"""Small cases that every backend runs, and what they leave behind. The processes of a comparison import this file."""

from dataclasses import dataclass
from types import SimpleNamespace

import elmo_kernels as ek
import torch
from torch import Tensor

LABELS, BATCH, DIM = 1100, 5, 48
OFFSET = 2048


@dataclass(frozen=True)
class Case:
    """One combination of what an update can be asked for."""

    fmt: str
    rounding: str
    loss: str
    kahan_rows: int = 0

    @property
    def name(self) -> str:
        """Unique among the cases."""
        return f"{self.fmt}-{self.rounding}-{self.loss}-{self.kahan_rows}"


CASES = [
    *(Case(fmt, "stochastic", "bce") for fmt in ek.FORMATS),
    Case("fp8", "stochastic", "squared_hinge"),
    Case("bf16", "nearest", "bce", kahan_rows=500),
    Case("fp8", "stochastic", "bce", kahan_rows=500),
]


def case_inputs() -> dict[str, Tensor]:
    """A batch with soft targets, whose positives lie before and in the chunk, the last of its model.

    Embeddings and the gradient of the step are small binary fractions, so their products are exact in any
    order of summation, and new weights can be compared by their bytes.
    """
    generator = torch.Generator().manual_seed(5)
    all_labels = OFFSET + LABELS
    pair_P = torch.randperm(all_labels * BATCH, generator=generator)[:100].sort().values
    return {
        "x_BD": torch.randint(-16, 17, (BATCH, DIM), generator=generator) / 16,
        "step_g_LB": torch.randint(-16, 17, (LABELS, BATCH), generator=generator) / 32,
        "label_P": pair_P // BATCH,
        "instance_P": pair_P % BATCH,
        "weight_P": torch.rand(100, generator=generator).clamp(min=0.05),
        "block_ptr": torch.searchsorted(pair_P // BATCH, torch.arange(0, all_labels + 1024, 1024)),
    }


def run_case(case: Case, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradient, loss, one large step (so that fp8 rows grow out of their exponents), top-k."""
    w = ek.make_chunk(case.fmt, LABELS, DIM, OFFSET, seed=11, std=0.03, kahan_rows=case.kahan_rows)
    x_BD, positives = inputs["x_BD"], SimpleNamespace(**inputs)
    g_LB, loss = ek.logit_grad(w, x_BD, positives, loss=case.loss, prior=-0.75, want_loss=True)
    assert loss is not None
    dx_BD, flags = torch.ones(BATCH, DIM), torch.zeros(2, dtype=torch.int64)
    ek.update_(
        w, inputs["step_g_LB"], x_BD, dx_BD,
        lr=0.3, weight_decay=0.01, rounding=case.rounding, seed=-3, step=1 << 40, flags=flags,
    )  # fmt: skip
    scores_BK, ids_BK = torch.full((BATCH, 7), -torch.inf), torch.full((BATCH, 7), -1)
    ek.topk_merge_(scores_BK, ids_BK, w, x_BD)
    out = {"g_LB": g_LB, "loss": loss, "dx_BD": dx_BD, "data_LD": w.data_LD, "flags": flags}
    out |= {"scores_BK": scores_BK, "ids_BK": ids_BK}
    if w.exponent_LG is not None:
        out["exponent_LG"] = w.exponent_LG
    if w.comp_HD is not None:
        out["comp_HD"] = w.comp_HD
    return out
