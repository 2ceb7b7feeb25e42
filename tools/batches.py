"""The random batches and the sizes that the benchmarks of the classifier share."""

from dataclasses import dataclass

import torch
from elmo_kernels import BLOCK_LABELS
from torch import Tensor

POSITIVES_A_ROW = 5
PRIOR_SHARE, PRIOR_LOGIT = 1e-4, -9.2
"""Share of positives, and about its logit, where logits start."""
LR, DECAY, STD, SEED = 1e-3, 1e-4, 0.02, 0


@dataclass(frozen=True)
class Shape:
    """Labels, features and instances of a row."""

    labels: int
    dim: int
    batch: int

    def __str__(self) -> str:
        return f"{self.labels}x{self.dim}x{self.batch}"

    @classmethod
    def parse(cls, text: str) -> "Shape":
        """From "LABELSxDIMxBATCH"."""
        labels, dim, batch = map(int, text.split("x"))
        return cls(labels, dim, batch)


@dataclass(slots=True)
class Batch:
    """Embeddings and sorted positives, as ``elmo_kernels.Positives`` describes them."""

    x_BD: Tensor
    label_P: Tensor
    instance_P: Tensor
    weight_P: Tensor
    block_ptr: Tensor


def make_batch(shape: Shape, device: torch.device) -> Batch:
    """Random embeddings of unit mean square, and a few random labels an instance."""
    generator = torch.Generator().manual_seed(SEED)
    count = shape.batch * POSITIVES_A_ROW
    label_P = torch.randint(shape.labels, (count,), generator=generator)
    pair_P = (label_P * shape.batch + torch.arange(count) % shape.batch).unique()
    starts = torch.arange(-(-shape.labels // BLOCK_LABELS) + 1) * BLOCK_LABELS
    label_P = pair_P // shape.batch
    return Batch(
        x_BD=torch.randn(shape.batch, shape.dim, generator=generator).to(device),
        label_P=label_P.to(device),
        instance_P=(pair_P % shape.batch).to(device),
        weight_P=torch.ones(len(pair_P), device=device),
        block_ptr=torch.searchsorted(label_P, starts).to(device),
    )
