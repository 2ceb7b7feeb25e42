"""The tensors that pass through the public operations, and the checks of their shapes.

Shape legend: B instances in the batch, L labels in the chunk, D features, G groups of features, H rows with
compensation, P positives, K top-k.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

BLOCK_LABELS = 1024
"""Sums over labels are formed in blocks of so many, added in label order: the chunk size never enters."""

GROUP_FEATURES = 128
"""Consecutive features of a label that share an fp8 exponent; the last group of a row may be smaller."""

DIM_MULTIPLE = 16
FORMATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.uint8}
ROUNDINGS = ("stochastic", "nearest")


@dataclass(slots=True)
class ChunkWeights:
    """The classifier weights of consecutive labels.

    Attributes:
        fmt: a key of ``FORMATS``.
        data_LD: float32, bfloat16, or uint8 E4M3 codes.
        exponent_LG: int8, fp8 only, a column for each ``GROUP_FEATURES`` features: a weight is
            ``e4m3(code) * 2**exponent``. It belongs to a group of a row, not to the row, because a kernel then
            decides it from the tile that it holds in registers, before it rounds.
        comp_HD: bfloat16 Kahan compensation of the first H rows, or None. These rows round to nearest.
        label_offset: label id of row 0, a multiple of ``BLOCK_LABELS``.
    """

    fmt: str
    data_LD: Tensor
    exponent_LG: Tensor | None
    comp_HD: Tensor | None
    label_offset: int


class Positives(Protocol):
    """The positive (label, instance) pairs of a batch, each at most once, sorted by label, ties by instance.

    Attributes:
        label_P: int64 label ids of the whole model, not of a chunk.
        instance_P: int64 rows of the batch.
        weight_P: float32 targets in (0, 1].
        block_ptr: int64, ``ceil(num_labels / BLOCK_LABELS) + 1``: the positives of label block b are
            ``[block_ptr[b], block_ptr[b + 1])``.
    """

    @property
    def label_P(self) -> Tensor: ...
    @property
    def instance_P(self) -> Tensor: ...
    @property
    def weight_P(self) -> Tensor: ...
    @property
    def block_ptr(self) -> Tensor: ...


class Fp8Operand(NamedTuple):
    """Embeddings in E4M3, ``value_BD = value of code_BD * 2**exponent_B``, from ``elmo_kernels.fp8_operand``.

    value_BD has the type of ``elmo_kernels.operand``, which holds it exactly; code_BD is uint8, exponent_B int8.
    """

    value_BD: Tensor
    code_BD: Tensor
    exponent_B: Tensor


def values(x: Tensor | Fp8Operand) -> Tensor:
    """Embeddings as numbers."""
    return x.value_BD if isinstance(x, Fp8Operand) else x


def num_groups(dim: int) -> int:
    """Exponents of one fp8 row."""
    return -(-dim // GROUP_FEATURES)


def require_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise ``ValueError`` that lists the choices unless ``value`` is one of them."""
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; choose one of {', '.join(choices)}.")


def require_dim(dim: int) -> None:
    """Raise ``ValueError`` unless the embedding size suits every backend."""
    if dim < DIM_MULTIPLE or dim % DIM_MULTIPLE:
        raise ValueError(f"the embedding size is {dim}; it must be a positive multiple of {DIM_MULTIPLE}.")


def require_tensor(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Raise ``ValueError`` unless the tensor is contiguous and has this dtype and shape."""
    if tensor.dtype != dtype or tuple(tensor.shape) != shape or not tensor.is_contiguous():
        kind = "contiguous" if tensor.is_contiguous() else "non-contiguous"
        found = f"{kind} {tensor.dtype} {tuple(tensor.shape)}"
        raise ValueError(f"{name} is {found}; it must be contiguous {dtype} {shape}.")


def require_chunk(w: ChunkWeights) -> None:
    """Raise ``ValueError`` unless the parts of a chunk fit together."""
    require_choice("format", w.fmt, tuple(FORMATS))
    labels, dim = w.data_LD.shape
    require_dim(dim)
    require_tensor("data_LD", w.data_LD, FORMATS[w.fmt], (labels, dim))
    if w.label_offset < 0 or w.label_offset % BLOCK_LABELS:
        raise ValueError(f"label_offset is {w.label_offset}; it must be a multiple of {BLOCK_LABELS}.")
    if (w.exponent_LG is not None) != (w.fmt == "fp8"):
        found = "without" if w.exponent_LG is None else "with"
        raise ValueError(f"format {w.fmt} {found} exponent_LG; fp8 has it, the others do not.")
    if w.exponent_LG is not None:
        require_tensor("exponent_LG", w.exponent_LG, torch.int8, (labels, num_groups(dim)))
    if w.comp_HD is not None:
        head = w.comp_HD.shape[0]
        if w.fmt == "fp32" or head > labels:
            raise ValueError(f"{w.fmt} with compensation for {head} of {labels} rows; bf16 and fp8 have it.")
        require_tensor("comp_HD", w.comp_HD, torch.bfloat16, (head, dim))
