"""Make the weights of a chunk, and read them back as float32."""

import math

import torch
from torch import Tensor

from elmo_kernels import rounding as rd
from elmo_kernels.reference import decode_rows, label_blocks, store_fp8_
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
    normal, standard deviation ``std``, at most 3.46 times it, and exact in float32 on every device.

    Raises:
        ValueError: as ``empty_chunk``, or for a ``std`` that is not positive and finite.
    """
    if not (math.isfinite(std) and std > 0):
        raise ValueError(f"the standard deviation of the first weights is {std}; it must be positive and finite.")
    w = empty_chunk(fmt, labels, dim, label_offset, kahan_rows=kahan_rows, device=device)
    for rows in label_blocks(w):
        label_L = torch.arange(rows.start, rows.stop, device=device) + label_offset
        _store_rows(w, rows, _normal_like(seed, label_L, dim) * (std * math.sqrt(3.0) / 2**16))
    return w


def _normal_like(seed: int, label_L: Tensor, dim: int) -> Tensor:
    """Sums of four centred uniform 16-bit integers as float32, standard deviation 2**16 / sqrt(3)."""
    bits_L2D = rd.random_bits(seed, INIT_STEP, label_L, torch.arange(2 * dim, device=label_L.device))
    total_L2D = (bits_L2D & 0xFFFF) + (bits_L2D >> 16)
    return (total_L2D[:, :dim] + total_L2D[:, dim:] - 2 * 0xFFFF).to(torch.float32)


def _store_rows(w: ChunkWeights, rows: slice, value_LD: Tensor) -> None:
    if w.exponent_LG is None:
        w.data_LD[rows] = value_LD.to(w.data_LD.dtype)
    else:
        store_fp8_(w, rows, value_LD)


def dequantize(w: ChunkWeights) -> Tensor:
    """float32 weights of a whole chunk, (L, D): 4 bytes a weight, so meant for tests and export."""
    require_chunk(w)
    return torch.cat([decode_rows(w, rows) for rows in label_blocks(w)])
