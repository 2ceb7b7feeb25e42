"""Make the weights of a chunk, and read them back as float32."""

import math

import torch
from torch import Tensor

from elmo_kernels import rounding as rd
from elmo_kernels.backends import backend
from elmo_kernels.reference import Step, decode_rows, label_blocks
from elmo_kernels.types import FORMATS, ChunkWeights, num_groups, require_choice, require_chunk, require_dim

INIT_STEP = -1


def empty_chunk(
    fmt: str, labels: int, dim: int, label_offset: int, *, kahan_rows: int = 0, device: torch.device | str = "cpu"
) -> ChunkWeights:
    """Weights of the labels ``[label_offset, label_offset + labels)`` whose values are yet to be written.

    Args:
        fmt: "fp32", "bf16" or "fp8". dim: a multiple of 16. label_offset: a multiple of ``BLOCK_LABELS``.
        kahan_rows: the first so many rows of this chunk carry a Kahan compensation (bf16, fp8), zero at first.

    Raises:
        ValueError: for an unknown format or a size out of range.
    """
    require_choice("format", fmt, tuple(FORMATS))
    require_dim(dim)
    if labels < 1 or not 0 <= kahan_rows <= labels:
        raise ValueError(f"{labels} labels with {kahan_rows} rows of compensation; at least 1 label, at most all rows.")
    w = ChunkWeights(
        fmt=fmt,
        data_LD=torch.empty(labels, dim, dtype=FORMATS[fmt], device=device),
        exponent_LG=torch.zeros(labels, num_groups(dim), dtype=torch.int8, device=device) if fmt == "fp8" else None,
        comp_HD=torch.zeros(kahan_rows, dim, dtype=torch.bfloat16, device=device) if kahan_rows else None,
        label_offset=label_offset,
    )
    require_chunk(w)
    return w


def make_chunk(
    fmt: str,
    labels: int,
    dim: int,
    label_offset: int,
    *,
    seed: int,
    std: float,
    kahan_rows: int = 0,
    device: torch.device | str = "cpu",
) -> ChunkWeights:
    """An ``empty_chunk`` with random weights, the same however the labels are cut in chunks.

    A weight is a sum of four uniform 16-bit integers from the hash of (seed, label, feature): close to
    normal, standard deviation ``std``, at most 3.46 times it, and exact in float32 on every device. It is
    rounded to nearest; a compensation starts at zero.

    Raises:
        ValueError: as ``empty_chunk``, or for a ``std`` that is not positive and finite.
    """
    if not (math.isfinite(std) and std > 0):
        raise ValueError(f"the standard deviation of the first weights is {std}; it must be positive and finite.")
    w = empty_chunk(fmt, labels, dim, label_offset, kahan_rows=kahan_rows, device=device)
    ops = backend(w.data_LD.device).ROWS
    flags = torch.zeros(2, dtype=torch.int64, device=w.data_LD.device)
    stream, scale = rd.stream_key(seed, INIT_STEP), std * math.sqrt(3.0) / 2**16
    for rows in label_blocks(w):
        value_LD = ops.normal(w, rows, stream).mul_(scale)
        # A step from zero against minus the values.
        ops.update_(w, rows, torch.zeros_like(value_LD), value_LD.neg_(), Step(1.0, 1.0, stream), "nearest", flags)
    if w.comp_HD is not None:
        w.comp_HD.zero_()
    return w


def dequantize(w: ChunkWeights) -> Tensor:
    """float32 weights of a whole chunk, (L, D): 4 bytes a weight, so meant for tests and export."""
    require_chunk(w)
    return torch.cat([decode_rows(w, rows) for rows in label_blocks(w)])
